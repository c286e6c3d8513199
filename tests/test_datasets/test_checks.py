from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS, MODELS

from spvit_mm.apis import load_samples
from spvit_mm.datasets import checks
from spvit_mm.datasets.checks import check_dataset, guard_files
from spvit_mm.models import SPViT
from spvit_mm.utils import CorruptImageError, UserError
from tests.test_engine.tiny import make_images

LOAD = [{'type': 'LoadImageFromFile'}]
TINY = dict(
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=16)
)


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / 'images')
    return tmp_path / 'images'


def test_wrapped_data_sets(folder, tmp_path):
    good = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    make_images(tmp_path / 'one', classes=['only'])
    bad = CustomDataset(data_prefix=str(tmp_path / 'one'), pipeline=LOAD)
    check_dataset(ConcatDataset([good, good]), 'training', 3)
    with pytest.raises(
        UserError, match='the CustomDataset of .*one.*, are of one class'
    ):
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
    with pytest.raises(UserError, match='are of one class'):
        check_dataset(dataset, 'training')
    check_dataset(dataset, 'test')  # one class of a test set can be wanted
    # Images of one class may be added to others.
    whole = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    both = ConcatDataset([whole, dataset], ignore_keys='classes')
    check_dataset(both, 'training', 3)


def test_classes_of_wrapped_folders(folder, tmp_path):
    make_images(tmp_path / 'fewer', classes=['b', 'c'])
    other = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    fewer = CustomDataset(data_prefix=str(tmp_path / 'fewer'), pipeline=LOAD)
    checks.check_same_classes(RepeatDataset(other, 2), other, 'validation')
    make_images(tmp_path / 'more', classes=['a', 'b'])
    more = CustomDataset(data_prefix=str(tmp_path / 'more'), pipeline=LOAD)
    both = ConcatDataset([other, more], ignore_keys='classes')
    checks.check_same_classes(both, other, 'validation')
    mixed = ConcatDataset([other, fewer], ignore_keys='classes')
    with pytest.raises(UserError, match='numbers its classes differently'):
        checks.check_same_classes(mixed, other, 'validation')
    with pytest.raises(UserError, match=r"only in validation: \['a'\]"):
        checks.check_same_classes(RepeatDataset(fewer, 2), other, 'validation')


@pytest.mark.parametrize('stem', ['patch', 'conv'])
def test_patch_of_an_image_that_it_does_not_fill(stem):
    backbone = SPViT(**TINY, img_size=20, patch_size=16, stem=stem)
    assert checks.patch_size(SimpleNamespace(backbone=backbone)) == (16, 16)


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
    guard_files(dataset)
    guard_files(dataset)  # once is enough, and twice is no harm
    with pytest.raises(CorruptImageError, match=str(path)):
        dataset[index]
    assert dataset[index + 2]['img'].shape == (20, 24, 3)

    skipping = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    if content is None:
        return
    np.random.seed(0)
    count = guard_files(skipping, skip=True)
    assert skipping[index]['img_path'] != str(path)
    assert torch.equal(count, torch.ones(1, dtype=torch.int64))
    testing = CustomDataset(data_prefix=str(folder), pipeline=LOAD, test_mode=True)
    guard_files(testing, skip=True)
    with pytest.raises(CorruptImageError):
        testing[index]


def test_a_broken_picture_of_the_test_data(folder, mmpretrain_scope):
    (folder / 'a' / '0.png').write_bytes(b'no image')
    data = dict(type='CustomDataset', data_prefix=str(folder), pipeline=LOAD)
    cfg = Config(dict(test_dataloader=dict(dataset=data)))
    backbone = dict(type='SPViT', img_size=20, patch_size=4, **TINY)
    with pytest.raises(UserError, match=r'a/0.png \(8 bytes\) cannot be read'):
        load_samples(cfg, MODELS.build(dict(type='ImageClassifier', backbone=backbone)))


def test_images_that_the_config_ignores(folder):
    load = [dict(type='LoadImageFromFile', ignore_empty=True)]
    dataset = CustomDataset(data_prefix=str(folder), pipeline=load)
    path = dataset.get_data_info(0)['img_path']
    guard_files(dataset)
    Path(path).unlink()
    assert dataset[0]['img_path'] != path


def test_empty_data_is_named(mmpretrain_scope, tmp_path):
    (tmp_path / 'list.txt').touch()
    cfg = dict(
        type='CustomDataset',
        data_prefix=str(tmp_path),
        ann_file=str(tmp_path / 'list.txt'),
    )
    with (
        pytest.raises(UserError, match=f"training .* data_prefix='{tmp_path}', ann_"),
        checks.naming_empty_data(dict(type='RepeatDataset', dataset=cfg), 'training'),
    ):
        DATASETS.build(cfg)
    # What a data set says clearly is left to it.
    with (
        pytest.raises(FileNotFoundError, match='none'),
        checks.naming_empty_data({}, 'training'),
    ):
        CustomDataset(data_prefix=f'{tmp_path}/none', pipeline=LOAD)


def test_files_of_a_folder_that_are_no_images_of_the_data(folder, tmp_path):
    dataset = CustomDataset(data_prefix=str(folder), pipeline=LOAD)
    assert checks.describe_left_out(dataset, 'training') == ''
    # What lies beside the folders, or is hidden, is nobody's image.
    (folder / 'README.txt').touch()
    (folder / 'a' / '.DS_Store').touch()
    assert checks.describe_left_out(dataset, 'training') == ''
    (folder / 'a' / 'deep').mkdir()
    for name in ('x.GIF', 'deep/y.gif', 'notes'):
        (folder / 'a' / name).touch()
    text = checks.describe_left_out(ConcatDataset([dataset, dataset]), 'test')
    assert text.count('leaves out 3 files of its folders: 2 .gif, 1 without an') == 2
    assert 'It reads .bmp, .jpeg,' in text
    # Chosen ones are not all of a folder.
    (tmp_path / 'list.txt').write_text('a/0.png 0\nb/0.png 1')
    some = dict(data_prefix=str(folder), pipeline=LOAD)
    for more in (dict(ann_file=str(tmp_path / 'list.txt')), dict(indices=2)):
        dataset = CustomDataset(**some, **more)
        assert checks.describe_left_out(dataset, 'test') == ''
