"""Data sets that need no download, and the transforms of our recipes."""

from . import digit_scenes  # noqa: F401  (registers DigitScenes where mmseg is)
from .digits import Digits
from .token_label_transforms import (
    PackTokenLabelInputs,
    TokenLabelRandomFlip,
    TokenLabelRandomResizedCrop,
)
from .token_labels import LabelMapError, TokenLabelDataset

__all__ = [
    'Digits',
    'LabelMapError',
    'PackTokenLabelInputs',
    'TokenLabelDataset',
    'TokenLabelRandomFlip',
    'TokenLabelRandomResizedCrop',
]
