"""Chosen classes of a folder, and ImageNet-100."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmpretrain.registry import DATASETS
from PIL import Image

from spvit_mm.apis import building
from spvit_mm.utils import UserError

CONFIG = 'configs/classification/sp-deit-tiny_4xb256_in100.py'
ROOT = Path(__file__).parents[2]


def make_tree(root, folders, images=1):
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(images):
            array = np.full((8, 8, 3), number, np.uint8)
            Image.fromarray(array).save(root / folder / f'{folder}_{i}.JPEG')


def build(root, class_folders, **kwargs):
    return DATASETS.build(
        dict(
            type='CustomSubsetDataset',
            data_prefix=str(root),
            class_folders=class_folders,
            **kwargs,
        )
    )


def test_takes_only_the_chosen_folders_in_alphabetical_order(tmp_path):
    make_tree(tmp_path, ['ant', 'bee', 'cat', 'dog'], images=2)
    dataset = build(tmp_path, ['dog', 'bee'])
    found = [
        (Path(dataset[i]['img_path']).name, dataset[i]['gt_label']) for i in range(4)
    ]
    assert found == [
        ('bee_0.JPEG', 0), ('bee_1.JPEG', 0), ('dog_0.JPEG', 1), ('dog_1.JPEG', 1),
    ]  # fmt: skip
    assert len(dataset) == 4
    assert tuple(dataset.metainfo['classes']) == ('bee', 'dog')


def test_labels_are_those_of_a_folder_of_these_classes_alone(tmp_path):
    make_tree(tmp_path / 'all', ['ant', 'bee', 'cat', 'dog'])
    make_tree(tmp_path / 'some', ['bee', 'dog'])
    alone = DATASETS.build(
        dict(type='CustomDataset', data_prefix=str(tmp_path / 'some'))
    )
    subset = build(tmp_path / 'all', ['dog', 'bee'])
    assert alone.folder_to_idx == subset.folder_to_idx
    assert list(alone.get_gt_labels()) == list(subset.get_gt_labels())


def test_names_from_a_file_and_of_the_classes(tmp_path):
    make_tree(tmp_path / 'data', ['n01', 'n02', 'n03'])
    names = tmp_path / 'names.txt'
    names.write_text('# two of three\nn03\n\nn01  # a fish\n')
    dataset = build(
        tmp_path / 'data', str(names), metainfo=dict(classes=('fish', 'bird'))
    )
    assert dataset.class_folders == ['n01', 'n03']
    assert list(dataset.metainfo['classes']) == ['fish', 'bird']


def test_missing_and_empty_classes_are_named(tmp_path):
    make_tree(tmp_path, ['ant', 'bee'])
    (tmp_path / 'cat').mkdir()
    message = r'no sub-folder for 2 of the 4 classes \(it has 3 others\): dog, eel\.'
    with pytest.raises(ValueError, match=message):
        build(tmp_path, ['ant', 'eel', 'dog', 'bee'])
    with pytest.raises(ValueError, match='no images of 1 of the 3 classes .*: cat'):
        build(tmp_path, ['ant', 'bee', 'cat'])
    with pytest.raises(ValueError, match='nowhere does not exist'):
        build(tmp_path / 'nowhere', ['ant', 'bee'])


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['ant'], 'needs two names or more'),
        (['ant', 'ant', 'bee'], 'some names twice: ant'),
        (['ant', 3], 'takes names of sub-folders, got 3'),
        (['ant', 'a/b'], "got 'a/b'"),
        ('nowhere.txt', 'nowhere.txt of `class_folders` does not exist'),
    ],
)
def test_bad_lists(tmp_path, names, message):
    make_tree(tmp_path, ['ant', 'bee'])
    with pytest.raises(ValueError, match=message):
        build(tmp_path, names)


def test_bad_arguments(tmp_path):
    make_tree(tmp_path, ['ant', 'bee'])
    with pytest.raises(ValueError, match='not `ann_file`'):
        build(tmp_path, ['ant', 'bee'], ann_file='x.txt')
    with pytest.raises(ValueError, match='names 1 classes'):
        build(tmp_path, ['ant', 'bee'], metainfo=dict(classes=('x',)))


def test_imagenet_100_config(tmp_path):
    cfg = Config.fromfile(str(ROOT / CONFIG))
    names = cfg.class_folders
    assert len(set(names)) == 100
    assert all(len(name) == 9 and name[0] == 'n' for name in names)
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 100
    make_tree(tmp_path / 'data/imagenet/train', [*names, 'n00000000'])
    for split in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        wanted = cfg[split].dataset
        assert list(wanted.class_folders) == names
    train = {**cfg.train_dataloader.dataset}
    train['data_prefix'] = str(tmp_path / train['data_prefix'])
    dataset = DATASETS.build(train)
    assert len(dataset) == 100
    assert dataset.pipeline(dataset.get_data_info(99))['inputs'].shape == (3, 224, 224)


def test_the_command_line_names_the_missing_class(tmp_path):
    make_tree(tmp_path, ['ant', 'bee'])
    cfg = dict(
        dataset=dict(
            type='CustomSubsetDataset',
            data_prefix=str(tmp_path),
            class_folders=['ant', 'cow'],
        )
    )
    message = 'no sub-folder for 1 of the 2 .*: cow'
    with pytest.raises(UserError, match=message), building('train_dataloader'):
        DATASETS.build(cfg['dataset'])
