import numpy as np
import pytest
from mmpretrain.registry import DATASETS

from spvit_mm.datasets.digits import load_digits_arrays, split_indices


def test_split_is_fixed_stratified_and_disjoint():
    train, test = split_indices('train'), split_indices('test')
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train, *test]) == list(range(1797))
    labels = load_digits_arrays()[1]
    assert np.bincount(labels[test]).min() >= 35
    # the same for everybody, whatever the library's version
    assert test[:5].tolist() == [21, 24, 28, 34, 35]


def test_samples():
    dataset = DATASETS.build(dict(type='Digits', split='test', pipeline=[]))
    assert len(dataset) == 360
    sample = dataset[0]
    images, labels = load_digits_arrays()
    i = sample['digit_id']
    assert sample['img'].shape == (8, 8, 3)
    assert sample['img'].dtype == np.uint8
    assert (sample['img'] == images[i][..., None]).all()
    assert sample['gt_label'] == labels[i]
    assert dataset.metainfo['classes'] == [str(digit) for digit in range(10)]


def test_indices_make_it_smaller():
    dataset = DATASETS.build(dict(type='Digits', split='train', indices=7))
    assert len(dataset) == 7


def test_unknown_split():
    with pytest.raises(ValueError, match="'train', 'test', 'all'"):
        DATASETS.build(dict(type='Digits', split='val'))
