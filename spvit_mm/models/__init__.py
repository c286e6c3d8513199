"""Spatial priors, the attention that uses them, and SP-ViT."""

from .attention import SpatialPriorAttention
from .classifiers import TokenLabelClassifier
from .embed import PEG, ConvStem
from .heads import TokenLabelClsHead
from .priors import (
    ConstantSpatialPrior,
    LinearSpatialPrior,
    MLPSpatialPrior,
    SpatialPrior,
    TableSpatialPrior,
    WindowSpatialPrior,
    relative_offsets,
)
from .relative import GatedPositionalAttention, RelativePositionAttention
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
