"""Checkpoints of other codebases -> ours, and back to the released names."""

from ..utils import CheckpointError, UnsafeCheckpointError
from .convert import (
    Conversion,
    Options,
    convert_file,
    convert_to_mm,
    convert_to_released,
)
from .safe_load import load_checkpoint_safely

__all__ = [
    'CheckpointError',
    'Conversion',
    'Options',
    'UnsafeCheckpointError',
    'convert_file',
    'convert_to_mm',
    'convert_to_released',
    'load_checkpoint_safely',
]
