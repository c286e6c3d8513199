"""Spatial priors, the attention that uses them, and SP-ViT."""

from .attention import SpatialPriorAttention
from .classifiers import TokenLabelClassifier
from .embed import PEG, ConvStem
from .heads import TokenLabelClsHead
from .priors import (
    ConstantSpatialPrior,
    MLPSpatialPrior,
    SpatialPrior,
    relative_offsets,
)
from .relations import LinearSpatialPrior, TableSpatialPrior, WindowSpatialPrior
from .relative_attention import GatedPositionalAttention, RelativePositionAttention
from .spvit import SPViT

__all__ = [
    'PEG',
    'ConstantSpatialPrior',
    'ConvStem',
    'GatedPositionalAttention',
    'LinearSpatialPrior',
    'MLPSpatialPrior',
    'RelativePositionAttention',
    'SPViT',
    'SpatialPrior',
    'SpatialPriorAttention',
    'TableSpatialPrior',
    'TokenLabelClassifier',
    'TokenLabelClsHead',
    'WindowSpatialPrior',
    'relative_offsets',
]
