"""Spatial priors, the attention that uses them, and SP-ViT."""

from .attention import SpatialPriorAttention
from .classifiers import TokenLabelClassifier
from .embed import PEG, ConvStem
from .heads import TokenLabelClsHead
from .priors import (
    ALiBiSpatialPrior,
    ConstantSpatialPrior,
    KERPLESpatialPrior,
    LinearSpatialPrior,
    LogCPBSpatialPrior,
    LookHereSpatialPrior,
    MLPSpatialPrior,
    SpatialPrior,
    TableSpatialPrior,
    WindowSpatialPrior,
    relative_offsets,
)
from .relative import GatedPositionalAttention, RelativePositionAttention
from .rotary import RotaryPositionAttention
from .spvit import SPViT

__all__ = [
    'ALiBiSpatialPrior',
    'PEG',
    'ConstantSpatialPrior',
    'ConvStem',
    'GatedPositionalAttention',
    'KERPLESpatialPrior',
    'LinearSpatialPrior',
    'LogCPBSpatialPrior',
    'LookHereSpatialPrior',
    'MLPSpatialPrior',
    'RelativePositionAttention',
    'RotaryPositionAttention',
    'SPViT',
    'SpatialPrior',
    'SpatialPriorAttention',
    'TableSpatialPrior',
    'TokenLabelClassifier',
    'TokenLabelClsHead',
    'WindowSpatialPrior',
    'relative_offsets',
]
