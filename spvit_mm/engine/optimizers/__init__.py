"""Wrappers of optimizers, and what constructs them."""

from .bfloat16 import BFloat16OptimWrapper
from .layer_decay import BackboneLayerDecayOptimWrapperConstructor

__all__ = ['BFloat16OptimWrapper', 'BackboneLayerDecayOptimWrapperConstructor']
