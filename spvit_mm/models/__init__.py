"""Spatial priors, the attention that uses them, and SP-ViT."""

from .attention import SpatialPriorAttention
from .classifiers import TokenLabelClassifier
from .embed import PEG, ConvStem
from .heads import TokenLabelClsHead
from .priors import MLPSpatialPrior, SpatialPrior, relative_offsets
from .spvit import SPViT

__all__ = [
    'PEG',
    'ConvStem',
    'MLPSpatialPrior',
    'SPViT',
    'SpatialPrior',
    'SpatialPriorAttention',
    'TokenLabelClassifier',
    'TokenLabelClsHead',
    'relative_offsets',
]
