import os
import subprocess
import sys
import threading

import mmcv
import numpy as np
import pytest
from mmengine.registry import DefaultScope

from spvit_mm.datasets.digits import load_digits_arrays, split_indices

pytest.importorskip('mmseg.datasets')
from spvit_mm.datasets.digit_scenes import (  # noqa: E402
    SOURCES,
    DigitScenes,
    draw_scene,
    write_scenes,
)

SCENES = dict(
    split='train',
    sizes=[(40, 64)],
    num_scenes=3,
    digit_sizes=(20, 30),
    num_digits=(1, 4),
    seed=0,
)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*.png'))
    }


def test_registered_in_mmseg():
    from mmseg.registry import DATASETS

    assert DATASETS.get('mmseg.DigitScenes') is DigitScenes


def test_sources_share_no_digit():
    train, val = (set(split_indices(source)) for source in SOURCES.values())
    assert not train & val
    assert len(train | val) == len(load_digits_arrays()[0])


def test_items(tmp_path):
    sizes = [(64, 96), (96, 48)]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
    ]
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DigitScenes(
            sizes=sizes, num_scenes=40, data_root=tmp_path, pipeline=pipeline
        )
    assert len(dataset) == 40
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == 11
    seen = set()
    for i in range(40):
        item = dataset[i]
        assert item['img'].shape == (*sizes[i % 2], 3)
        mask = item['gt_seg_map']
        assert mask.shape == sizes[i % 2]
        assert 0 < (mask > 0).mean() < 0.5
        # ink is brighter than the paper around it
        gray = item['img'][..., 0].astype(float)
        assert gray[mask > 0].mean() > gray[mask == 0].mean() + 30
        seen |= set(np.unique(mask))
    assert seen == set(range(11))


def test_mask_has_the_class_of_its_digit():
    images, labels = load_digits_arrays()
    for i in range(20):
        rng = np.random.default_rng(i)
        one = np.s_[i : i + 1]
        _, mask = draw_scene(rng, images[one], labels[one], (40, 40), (24, 32), (1, 1))
        assert set(np.unique(mask)) == {0, labels[i] + 1}


def test_same_arguments_same_files(tmp_path):
    write_scenes(tmp_path / 'a', **SCENES)
    write_scenes(tmp_path / 'b', **SCENES)
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    write_scenes(tmp_path / 'c', **{**SCENES, 'seed': 1})
    assert files(tmp_path / 'a') != files(tmp_path / 'c')


def test_other_arguments_other_folder(tmp_path):
    for seed in (0, 1):
        DigitScenes(num_scenes=1, seed=seed, data_root=tmp_path)
    DigitScenes(num_scenes=1, seed=1, data_root=tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_there_stays(tmp_path):
    dataset = DigitScenes(num_scenes=2, data_root=tmp_path)
    path = dataset[0]['img_path']
    mmcv.imwrite(np.full((64, 96, 3), 7, np.uint8), path)
    DigitScenes(num_scenes=2, data_root=tmp_path)
    assert (mmcv.imread(path) == 7).all()


def test_several_at_once(tmp_path):
    write_scenes(tmp_path / 'alone', **SCENES)
    threads = [
        threading.Thread(target=write_scenes, args=(tmp_path / 'all',), kwargs=SCENES)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / 'all') == files(tmp_path / 'alone')
    assert sorted(os.listdir(tmp_path)) == ['all', 'alone']  # nothing left over


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(split='test'), "`split` must be one of ('train', 'val'), got 'test'"),
        (dict(sizes=(16, 96)), '`sizes`'),
        (dict(num_scenes=0), '`num_scenes`'),
        (dict(digit_sizes=(30, 20)), '`digit_sizes`'),
        (dict(num_digits=(0, 3)), '`num_digits`'),
    ],
)
def test_bad_arguments(arguments, words, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DigitScenes(data_root=tmp_path / 'new', **arguments)
    assert words in str(error.value)
    assert not (tmp_path / 'new').exists()


def test_mmseg_is_optional(tmp_path):
    code = (
        "import sys; sys.modules['mmseg'] = None\n"
        'import spvit_mm.datasets.digit_scenes as module\n'
        "assert not hasattr(module, 'DigitScenes')"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


LOOKED_BEFORE = "from mmseg.registry import DATASETS\nDATASETS.get('ADE20KDataset')\n"


@pytest.mark.parametrize('before', ['', 'import mmseg.datasets\n', LOOKED_BEFORE])
def test_registered_when_mmseg_looks_for_it(before):
    """Also where mmseg was imported, or had looked around, before us."""
    code = (
        f'{before}import sys, spvit_mm\n'
        "assert sys.argv[1] == 'loaded' or 'mmseg.datasets' not in sys.modules\n"
        'from mmseg.registry import DATASETS\n'
        "assert DATASETS.get('DigitScenes').__name__ == 'DigitScenes'"
    )
    loaded = 'loaded' if before else 'not'
    subprocess.run([sys.executable, '-c', code, loaded], check=True)
