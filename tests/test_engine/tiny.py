"""A tiny folder of images and tiny configs, for tests that train."""

from pathlib import Path

import mmcv
import numpy as np

MODEL = """
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', img_size=16, patch_size=8, drop_rate=0.1,
        drop_path_rate=0.1,
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)),
    head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16))
data_preprocessor = dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3)
"""

DATA = """
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=16),
    dict(type='RandomFlip', prob=0.5),
    dict(type='ColorJitter', brightness=0.4),
    dict(type='PackInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(16, 16)),
    dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={persistent},
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_prefix={data!r} + '/train',
                 pipeline=train_pipeline),
    sampler=dict(type={sampler!r}, shuffle=True))
val_dataloader = dict(
    batch_size=4, num_workers=0, collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_prefix={data!r} + '/val',
                 pipeline=test_pipeline, test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='Accuracy', topk=1)
test_dataloader = val_dataloader
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
"""

EPOCHS = """
train_cfg = dict(by_epoch=True, max_epochs={length}, val_interval=1)
param_scheduler = dict(type='CosineAnnealingLR', T_max=4)
checkpoint_by_epoch = True
"""

ITERS = """
train_cfg = dict(by_epoch=False, max_iters={length}, val_interval=4)
param_scheduler = dict(type='CosineAnnealingLR', T_max=12, by_epoch=False)
checkpoint_by_epoch = False
"""

RUNTIME = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['spvit_mm'])
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed={seed})
visualizer = dict(type='UniversalVisualizer', vis_backends=[])
default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', interval={interval},
                    by_epoch=checkpoint_by_epoch),
    random_state=dict(type='RandomStateHook'),
    visualization=dict(type='VisualizationHook', enable=False))
auto_scale_lr = dict(base_batch_size=8)
"""


def make_images(folder: Path, classes=('a', 'b', 'c'), images: int = 4) -> None:
    """Write classes of images of 20 x 24 pixels, each class of its own brightness."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for j in range(images):
            pixels = rng.integers(60 * i, 60 * i + 60, (20, 24, 3), dtype=np.uint8)
            mmcv.imwrite(pixels, str(folder / name / f'{j}.png'))


def make_data(folder: Path) -> Path:
    """Write an ImageNet-like folder with train/ and val/."""
    make_images(folder / 'train')
    make_images(folder / 'val', images=2)
    return folder


def write_config(
    path: Path,
    data: Path,
    by_epoch: bool = True,
    length: int = 2,
    interval: int = 1,
    workers: int = 0,
    persistent: bool = False,
    sampler: str = None,
    seed=0,
    more: str = '',
) -> Path:
    """Write a config of a tiny vision transformer."""
    if sampler is None:
        sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    text = MODEL
    text += DATA.format(
        data=str(data), workers=workers, persistent=persistent, sampler=sampler
    )
    text += (EPOCHS if by_epoch else ITERS).format(length=length)
    text += RUNTIME.format(seed=seed, interval=interval) + more
    path.write_text(text)
    return path
