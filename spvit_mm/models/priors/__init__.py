"""Spatial relation functions: relative patch coordinates -> 2D spatial priors."""

from .base import SpatialPrior, place_offsets, relative_offsets
from .constant import ConstantSpatialPrior
from .distance import (
    ALiBiSpatialPrior,
    KERPLESpatialPrior,
    LogCPBSpatialPrior,
    LookHereSpatialPrior,
)
from .mlp import MLPSpatialPrior
from .simple import LinearSpatialPrior, TableSpatialPrior, WindowSpatialPrior

__all__ = [
    'ALiBiSpatialPrior',
    'ConstantSpatialPrior',
    'KERPLESpatialPrior',
    'LinearSpatialPrior',
    'LogCPBSpatialPrior',
    'LookHereSpatialPrior',
    'MLPSpatialPrior',
    'SpatialPrior',
    'TableSpatialPrior',
    'WindowSpatialPrior',
    'place_offsets',
    'relative_offsets',
]
