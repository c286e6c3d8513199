"""Data sets that need no download, and the transforms of our recipes."""

from .digits import Digits
from .subset import CustomSubsetDataset
from .token_label_transforms import (
    PackTokenLabelInputs,
    TokenLabelRandomFlip,
    TokenLabelRandomResizedCrop,
)
from .token_labels import TokenLabelDataset

try:
    from mmseg.registry import DATASETS as SEG_DATASETS
except ImportError:  # mmsegmentation is optional
    SEG_DATASETS = None
else:
    # mmseg's data sets take a quarter of a second to import, so DigitScenes comes
    # when its registry first looks for one, and not with every import of ours.
    _digit_scenes = 'spvit_mm.datasets.digit_scenes'
    if SEG_DATASETS._imported:
        from . import digit_scenes  # noqa: F401
    elif _digit_scenes not in SEG_DATASETS._locations:
        SEG_DATASETS._locations.append(_digit_scenes)

__all__ = [
    'CustomSubsetDataset',
    'Digits',
    'PackTokenLabelInputs',
    'TokenLabelDataset',
    'TokenLabelRandomFlip',
    'TokenLabelRandomResizedCrop',
]
