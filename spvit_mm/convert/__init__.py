"""Checkpoints of other codebases -> ours, and back to the released names."""

from .convert import (
    Conversion,
    Options,
    convert_file,
    convert_to_mm,
    convert_to_released,
    convert_to_timm,
)

__all__ = [
    'Conversion',
    'Options',
    'convert_file',
    'convert_to_mm',
    'convert_to_released',
    'convert_to_timm',
]
