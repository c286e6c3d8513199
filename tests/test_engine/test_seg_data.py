"""Bad segmentation data ends in a message that names the file."""

import mmcv
import numpy as np
import pytest

from tests.test_tools.test_train_test import command, fails

pytest.importorskip('mmseg.models')

CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['spvit_mm'])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', size=(32, 48), seg_pad_val=255, mean=[0.] * 3,
        std=[255.] * 3),
    backbone=dict(
        type='mmpretrain.SPViT', img_size=(32, 48), patch_size=8, out_type='featmap',
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
        num_spsa_layers=1),
    decode_head=dict(
        type='FCNHead', in_channels=16, in_index=0, channels=8, num_convs=1,
        num_classes=2, norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(32, 48)), dict(type='PackSegInputs')]
dataset = dict(
    type='BaseSegDataset', data_root={data!r},
    metainfo=dict(classes=('dark', 'bright')),
    data_prefix=dict(img_path='images', seg_map_path='masks'),
    img_suffix='.png', seg_map_suffix='.png', pipeline=pipeline)
train_dataloader = dict(
    batch_size=2, num_workers={workers}, dataset=dataset,
    sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
custom_hooks = [dict(type='mmpretrain.SegDataCheckHook')]
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(
    type='mmpretrain.AtomicCheckpointHook', by_epoch=False))
"""


@pytest.fixture
def project(tmp_path):
    """A folder of images and masks and its config."""
    rng = np.random.default_rng(0)
    for i in range(4):
        image = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
        mmcv.imwrite(image, str(tmp_path / f'data/images/{i}.png'))
        mask = (image[..., 0] > 127).astype(np.uint8)
        mmcv.imwrite(mask, str(tmp_path / f'data/masks/{i}.png'))
    write(tmp_path)
    return tmp_path


def write(project, workers=0):
    text = CONFIG.format(data=str(project / 'data'), workers=workers)
    (project / 'seg.py').write_text(text)


def message(capsys, project, *options):
    options = ('--cfg-options', *options) if options else ()
    return fails(
        capsys, 'train.py', project / 'seg.py', '--work-dir', project / 'w', *options
    )


def test_good_data_and_ignored_pixels(project):
    mask = np.full((32, 48), 255, np.uint8)
    mmcv.imwrite(mask, str(project / 'data/masks/0.png'))
    command('train.py', project / 'seg.py', '--work-dir', project / 'w')
    assert (project / 'w/last_checkpoint').exists()


@pytest.mark.parametrize('workers', [0, 1])
def test_class_out_of_range(workers, project, capsys):
    write(project, workers)
    path = project / 'data/masks/1.png'
    mask = mmcv.imread(str(path), flag='unchanged')
    mask[3, 5] = 7
    mmcv.imwrite(mask, str(path))
    line = message(capsys, project)
    assert f'{path} holds the values [7], and the head has num_classes=2 ' in line


def test_cut_off(project, capsys):
    path = project / 'data/masks/1.png'
    path.write_bytes(path.read_bytes()[:40])
    assert f'{path} (40 bytes) cannot be read' in message(capsys, project)


def test_values_as_the_file_has_them(project, capsys):
    """Where 0 means "no class", mmsegmentation counts from the value 1."""
    line = message(capsys, project, 'train_dataloader.dataset.reduce_zero_label=True')
    assert 'hold the values 0 and 255 after reduce_zero_label alone, where' in line
    path = project / 'data/masks/1.png'
    mmcv.imwrite(mmcv.imread(str(path), flag='unchanged') + 2, str(path))
    line = message(capsys, project, 'train_dataloader.dataset.reduce_zero_label=True')
    assert (
        f'{path} holds the values [3], and the head has num_classes=2 (values from 1 to 2,'
        in line
    )


def test_masks_of_one_class_beside_others(project):
    """Only all of them together must hold two."""
    for i in (0, 1, 3):
        mask = np.zeros((32, 48), np.uint8)
        mmcv.imwrite(mask, str(project / f'data/masks/{i}.png'))
    command('train.py', project / 'seg.py', '--work-dir', project / 'w')
