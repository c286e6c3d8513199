import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import MODELS

from spvit_mm.engine import CorruptImageError, UserError, check_dataset, guard_images
from spvit_mm.engine.data_checks import (
    building_data,
    check_normalization,
    check_widths,
    describe_folder,
)
from spvit_mm.engine.hooks import DataCheckHook
from tests.test_engine.tiny import make_images

LOAD = [{'type': 'LoadImageFromFile'}]


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / 'images')
    return tmp_path / 'images'


def test_wrapped_data_sets(folder, tmp_path):
    good = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    make_images(tmp_path / 'one', classes=['only'])
    bad = CustomDataset(data_prefix=str(tmp_path / 'one'), pipeline=LOAD)
    check_dataset(ConcatDataset([good, good]), 'training', 3)
    with pytest.raises(UserError, match=r'holds 1 sub-folders \(only\)'):
        check_dataset(ConcatDataset([good, bad], ignore_keys='classes'), 'training', 3)
    with pytest.raises(UserError, match='labels up to 2 .* has num_classes=2 '):
        check_dataset(good, 'test', 2)
    with pytest.raises(
        UserError, match='labels up to 2 .* num_classes=1 .labels from 0 to 0.'
    ):
        check_dataset(good, 'training', 1)


def test_one_class_in_an_annotation_file(folder, tmp_path):
    lines = [f'a/{i}.png 1' for i in range(4)]
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    dataset = CustomDataset(
        data_prefix=str(folder),
        ann_file=str(tmp_path / 'list.txt'),
        metainfo={'classes': ('x', 'y')},
        pipeline=LOAD,
    )
    with pytest.raises(UserError, match='of one class'):
        check_dataset(dataset, 'training')
    check_dataset(dataset, 'test')  # one class of a test set can be wanted


@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_guarded_images(folder, content):
    path = folder / 'a' / '0.png'
    path.unlink() if content is None else path.write_bytes(content)
    (folder / 'a' / '0.png.txt').touch()
    dataset = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    if content is None:  # vanished after the data set was built
        dataset = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
        path = folder / 'a' / '1.png'
        path.unlink()
    index = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))].index(
        str(path)
    )
    guard_images(dataset)
    guard_images(dataset)  # once is enough, and twice is no harm
    with pytest.raises(CorruptImageError, match=str(path)):
        dataset[index]
    assert dataset[index + 2]['img'].shape == (20, 24, 3)

    skipping = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    if content is None:
        return
    np.random.seed(0)
    count = guard_images(skipping, skip=True)
    assert skipping[index]['img_path'] != str(path)
    assert torch.equal(count, torch.ones(1, dtype=torch.int64))
    testing = CustomDataset(data_prefix=str(folder), pipeline=LOAD, test_mode=True)
    guard_images(testing, skip=True)
    with pytest.raises(CorruptImageError):
        testing[index]


def test_describe_folder(folder, tmp_path):
    assert (
        'images holds 3 sub-folders (a, b, c) and, in all of them, files: 12 .png.'
        in (describe_folder(str(folder)))
    )
    assert f'does not exist ({tmp_path} does)' in describe_folder(f'{tmp_path}/x/y')
    assert 'is a file' in describe_folder(str(folder / 'a' / '0.png'))


def test_missing_folder_is_named(tmp_path):
    cfg = dict(dataset=dict(type='CustomDataset', data_prefix=f'{tmp_path}/none'))
    with (
        pytest.raises(UserError, match='FileNotFoundError: .*No such file'),
        building_data(cfg, 'training'),
    ):
        CustomDataset(data_prefix=f'{tmp_path}/none', pipeline=LOAD)


def test_widths_that_do_not_fit(mmpretrain_scope):
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SPViT', arch='deit-tiny', img_size=32),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=192),
        )
    )
    check_widths(model)
    model.head.in_channels = 384
    with pytest.raises(UserError, match='is 384 and the backbone gives 192'):
        check_widths(model)


@pytest.mark.parametrize('stem', ['patch', 'conv'])
def test_normalization_of_other_channels(stem, mmpretrain_scope):
    def model(in_channels, **preprocessor):
        backbone = dict(type='SPViT', arch='deit-tiny', stem=stem, img_size=16)
        with torch.device('meta'):
            return MODELS.build(
                dict(
                    type='ImageClassifier',
                    backbone=dict(backbone, in_channels=in_channels),
                    data_preprocessor=preprocessor,
                )
            )

    check_normalization(model(3))
    check_normalization(model(3, mean=[0.0, 1, 2], std=[1.0]))
    check_normalization(model(1, mean=[0.0], std=[1.0]))
    with pytest.raises(UserError, match='mean has 2 values, .* in_channels=3'):
        check_normalization(model(3, mean=[0.0, 1], std=[1.0]))
    with pytest.raises(UserError, match='std has 3 values, .* in_channels=1'):
        check_normalization(model(1, mean=[0.0], std=[1.0, 1, 1]))


def test_argument():
    with pytest.raises(ValueError, match="'error' or 'skip', got 'no'"):
        DataCheckHook('no')
