"""The 1,797 real handwritten digits that scikit-learn ships."""

from functools import lru_cache

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

SPLITS = ('train', 'test', 'all')
NUM_TEST = 360


@lru_cache(maxsize=1)
def load_digits_arrays():
    """The digits as images.

    Returns:
        Tuple[np.ndarray, np.ndarray]: (1797, 8, 8) uint8 images with ink at
        255 (the source has 17 levels), and (1797,) int64 labels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images, digits.target.astype(np.int64)


def split_indices(split):
    """Indices of a split: fixed and stratified, so the same for everybody.

    Args:
        split (str): 'train' (1,437 digits), 'test' (360) or 'all'.

    Returns:
        np.ndarray: Sorted indices into :func:`load_digits_arrays`.
    """
    from sklearn.model_selection import train_test_split

    if split not in SPLITS:
        raise ValueError(f'`split` must be one of {SPLITS}, got {split!r}.')
    labels = load_digits_arrays()[1]
    indices = np.arange(len(labels))
    if split == 'all':
        return indices
    train, test = train_test_split(
        indices, test_size=NUM_TEST, stratify=labels, random_state=0
    )
    return np.sort(train if split == 'train' else test)


@DATASETS.register_module()
class Digits(BaseDataset):
    """Handwritten digits, 8 x 8 pixels, with no download and no files.

    From the test set of UCI's "Optical Recognition of Handwritten Digits", as
    scikit-learn ships it. A sample is ``img``, an (8, 8, 3) uint8 array of
    three equal channels, and ``gt_label``.

    Args:
        split (str): 'train' (1,437 images), 'test' (360) or 'all'.
            Defaults to 'train'.
        metainfo (dict, optional): Meta information. Defaults to None.
        **kwargs: ``pipeline``, ``indices`` and the other arguments of
            mmpretrain's BaseDataset that concern no files.
    """

    METAINFO = {'classes': [str(digit) for digit in range(10)]}

    def __init__(self, split='train', metainfo=None, **kwargs):
        if split not in SPLITS:
            raise ValueError(f'`split` must be one of {SPLITS}, got {split!r}.')
        self.split = split
        super().__init__(ann_file='', metainfo=metainfo, **kwargs)

    def load_data_list(self):
        """Collect the samples of the split."""
        images, labels = load_digits_arrays()
        return [
            dict(
                img=np.repeat(images[i][..., None], 3, axis=-1),
                gt_label=int(labels[i]),
                digit_id=int(i),
            )
            for i in split_indices(self.split)
        ]

    def extra_repr(self):
        """Lines that describe the dataset."""
        return [f'The `split` of the digits: \t{self.split}']
