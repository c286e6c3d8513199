"""Spatial relation functions: relative patch coordinates -> 2D spatial priors."""

from .base import SpatialPrior, place_offsets, relative_offsets
from .constant import ConstantSpatialPrior
from .mlp import MLPSpatialPrior
from .simple import LinearSpatialPrior, TableSpatialPrior, WindowSpatialPrior

__all__ = [
    'ConstantSpatialPrior',
    'LinearSpatialPrior',
    'MLPSpatialPrior',
    'SpatialPrior',
    'TableSpatialPrior',
    'WindowSpatialPrior',
    'place_offsets',
    'relative_offsets',
]
