"""The same command lines serve mmsegmentation's configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch

from spvit_mm.apis import build_model, load_config, load_model
from tests.test_tools.test_train_test import TOOLS, command, fails

# With mmcv-lite, mmsegmentation itself cannot be imported.
pytest.importorskip('mmseg.models')

CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['spvit_mm'])
data_preprocessor = dict(type='SegDataPreProcessor', size=(32, 32), seg_pad_val=255)
model = dict(
    type='EncoderDecoder', data_preprocessor=data_preprocessor,
    backbone=dict(
        type='mmpretrain.{backbone}', img_size=32, patch_size=8,
        out_type='featmap', drop_rate=0.1, final_norm=False,
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)),
    decode_head=dict(
        type='FCNHead', in_channels=16, in_index=0, channels=8, num_convs=1,
        num_classes=2, norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=f, keep_ratio=True) for f in (0.5, 1.0, 1.5)],
        [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
        [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
tta_model = dict(type='SegTTAModel')
dataset = dict(
    type='BaseSegDataset', data_root={data!r}, reduce_zero_label=False,
    metainfo=dict(classes=('dark', 'bright'), palette=[[0, 0, 0], [255, 0, 0]]),
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png', seg_map_suffix='.png', pipeline=pipeline)
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dataset,
    sampler=dict(type='InfiniteSampler', shuffle=True))
val_dataloader = dict(
    batch_size=1, num_workers=0, dataset=dict(**dataset, test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
randomness = dict(seed=0)
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_hooks = dict(
    checkpoint=dict(
        type='mmpretrain.AtomicCheckpointHook', by_epoch=False, interval=2),
    random_state=dict(type='mmpretrain.RandomStateHook'),
    visualization=dict(type='SegVisualizationHook'))
"""


def write_data(folder, sizes):
    """Images and masks: a bright right part on a dark ground."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(sizes):
        label = np.zeros((height, width), np.uint8)
        label[:, width // 4 * i + 4 :] = 1
        image = rng.integers(0, 50, (height, width, 3)) + 200 * label[..., None]
        mmcv.imwrite(image.astype(np.uint8), str(folder / f'images/{i}.png'))
        mmcv.imwrite(label, str(folder / f'labels/{i}.png'))


def write_config(tmp_path, backbone):
    write_data(tmp_path / 'data', [(32, 32)] * 3)
    config = tmp_path / 'seg.py'
    text = CONFIG.replace('{backbone}', backbone)
    config.write_text(text.replace('{data!r}', repr(str(tmp_path / 'data'))))
    return config


def test_segmentation(tmp_path, capsys):
    config = write_config(tmp_path, 'VisionTransformer')

    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    command('train.py', config, '--work-dir', whole)
    middle = whole / 'iter_2.pth'
    command('train.py', config, '--work-dir', resumed, '--resume', middle)
    expected, actual = (
        torch.load(w / 'iter_4.pth', weights_only=False)['state_dict']
        for w in (whole, resumed)
    )
    assert all(torch.equal(actual[k], expected[k]) for k in expected)

    common = ('test.py', config, whole / 'iter_4.pth', '--work-dir', tmp_path / 'w')
    out = tmp_path / 'metrics.json'
    command(
        *common, '--tta', '--show-dir', tmp_path / 'show', '--out', out,
        '--out-item', 'metrics',
    )  # fmt: skip
    assert 0 <= json.loads(out.read_text())['mIoU'] <= 100
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 3
    command(*common, '--out', tmp_path / 'maps')
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 3
    command('analysis/get_flops.py', config)
    assert 'Input shape: (3, 32, 32)' in capsys.readouterr().out
    # Images without masks, as those of a test server, are drawn as well.
    bare = tmp_path / 'bare.py'
    bare.write_text(
        f'_base_ = {str(config)!r}\n'
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]\n"
        'test_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
    )
    command(
        'visualization/show_segmentation.py', bare, whole / 'iter_4.pth', '--out',
        tmp_path / 'bare.png',
    )  # fmt: skip
    assert (tmp_path / 'bare.png').is_file()

    empty = tmp_path / 'empty'
    empty.mkdir()
    line = fails(
        capsys, 'train.py', config, '--work-dir', tmp_path / 'w', '--cfg-options',
        f'train_dataloader.dataset.data_root={empty}',
    )  # fmt: skip
    assert f"No such file or directory: '{empty}/images'" in line


def test_sparse_segmentor(tmp_path, capsys):
    config = write_config(tmp_path, 'SPViT')
    weights, out = tmp_path / 'trained.pth', tmp_path / 'sparse.pth'
    options = {'model.backbone.num_spsa_layers': 1}
    model = build_model(load_config(str(config), options)).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    torch.save(model.state_dict(), weights)
    option = ('--cfg-options', 'model.backbone.num_spsa_layers=1')
    tool = 'model_converters/sparsify_priors.py'
    command(tool, config, weights, out, '--finetune', 1, '--keep-mass', 0.6, *option)
    printed = capsys.readouterr().out
    assert 'Grid of 4 x 4 patches' in printed
    assert 'mIoU: ' in printed
    assert 'after fine-tuning, epochs: 1' in printed
    command('test.py', tmp_path / 'sparse.py', out, '--work-dir', tmp_path / 'w')
    _, sparse = load_model(str(tmp_path / 'sparse.py'), str(out))
    kept = sparse.backbone.layers[0].attn.kept
    assert 0 < kept.double().mean() < 0.8
    # on another grid, too
    with torch.no_grad():
        assert sparse(torch.randn(1, 3, 48, 24), mode='tensor').shape[1] == 2
    command(
        'analysis/binarize_priors.py', config, weights, '--by', 'fewest',
        '--keep', 0.6, '--mass-batches', 1, '--finetune', 1, *option,
    )  # fmt: skip
    assert 'mIoU' in capsys.readouterr().out


def test_spvit_takes_images_of_any_shape(tmp_path):
    """Whole and slide inference and several scales, from 1:4 to 4:1, odd sizes."""
    config = write_config(tmp_path, 'SPViT')
    environment = dict(
        os.environ,
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        OMP_NUM_THREADS='1',
        PORT='29571',
    )
    work_dir = tmp_path / 'w'
    done = subprocess.run(
        [str(TOOLS / 'dist_train.sh'), str(config), '2', '--work-dir', str(work_dir)]
        + ['--cfg-options', 'model.backbone.num_spsa_layers=1'],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    write_data(tmp_path / 'odd', [(19, 76), (75, 19), (33, 47)])
    options = ['--cfg-options', 'model.backbone.num_spsa_layers=1']
    options += [f'test_dataloader.dataset.data_root={tmp_path / "odd"}']
    slide = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size="(32, 32)"']
    slide += ['model.test_cfg.stride="(21, 21)"']
    for name, more in (('whole', []), ('slide', slide), ('tta', [])):
        out, show = tmp_path / f'{name}.json', tmp_path / name
        command(
            'test.py', config, work_dir / 'iter_4.pth', '--work-dir', tmp_path / 't',
            '--out', out, '--out-item', 'metrics', '--show-dir', show,
            *(['--tta'] if name == 'tta' else []), *options, *more,
        )  # fmt: skip
        assert 0 <= json.loads(out.read_text())['mIoU'] <= 100
        assert len(list(show.rglob('*.png'))) == 3
