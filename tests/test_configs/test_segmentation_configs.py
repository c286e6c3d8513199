"""Every segmentation config builds and runs a forward with small inputs."""

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.dataset.utils import pseudo_collate
from mmengine.fileio import load
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.visualization import Visualizer

from tests.test_tools.test_train_test import command

from .small import PATHS, ROOT, names, read, shrink

pytest.importorskip('mmseg.models')
NAMES = names('segmentation')
DEMO = PATHS['spvit-mini_upernet_1xb16-700i_digit-scenes-64x96']


@pytest.fixture(autouse=True)
def _mmseg_scope():
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def small(cfg):
    """`shrink`, and no side of the crop above 128; returns the crop, too."""
    cfg = shrink(cfg)
    size = tuple(min(side, 128) for side in cfg.model.data_preprocessor.size)
    cfg.model.data_preprocessor.size = cfg.model.backbone.img_size = size
    return cfg, size


@pytest.mark.parametrize('name', NAMES)
def test_config(name, tmp_path):
    cfg = read(name)
    rng = np.random.default_rng(0)
    classes = cfg.model.decode_head.num_classes
    image = rng.integers(0, 255, (90, 150, 3), dtype=np.uint8)
    mask = rng.integers(1, classes, (90, 150), dtype=np.uint8)
    mmcv.imwrite(image, str(tmp_path / 'image.png'))
    mmcv.imwrite(mask, str(tmp_path / 'mask.png'))

    def info():
        return dict(
            img_path=str(tmp_path / 'image.png'),
            seg_map_path=str(tmp_path / 'mask.png'),
            seg_fields=[],
            label_map=None,
            reduce_zero_label='ade20k' in name,
        )

    cfg, size = small(cfg)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'RandomCrop':
            step.crop_size = size
    train = Compose(cfg.train_dataloader.dataset.pipeline)
    batch = pseudo_collate([train(info()), train(info())])
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    model.train()
    data = model.data_preprocessor(batch, training=True)
    assert data['inputs'].shape == (2, 3, *size)
    losses = model(**data, mode='loss')
    loss = sum(value for key, value in losses.items() if 'loss' in key)
    assert loss.isfinite()
    loss.backward()
    assert model.backbone.layers[0].attn.prior.w2.grad.abs().sum() > 0

    model.eval()
    if cfg.model.test_cfg.mode == 'slide':
        model.test_cfg.crop_size, model.test_cfg.stride = (80, 96), (64, 64)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (200, 90)
    test = Compose(cfg.test_dataloader.dataset.pipeline)
    with torch.no_grad():
        (sample,) = model.test_step(pseudo_collate([test(info())]))
    assert sample.pred_sem_seg.data.shape == (1, 90, 150)
    assert sample.pred_sem_seg.data.min() >= 0
    assert sample.pred_sem_seg.data.max() < classes


@pytest.mark.parametrize('name', NAMES)
def test_data_and_optimizer(name):
    """The parts that need no data on disk are built."""
    from mmengine.optim import build_optim_wrapper
    from mmseg.registry import DATASETS, HOOKS, METRICS

    cfg = read(name)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        if dataset.type != 'DigitScenes':
            assert split == 'train' or dataset.test_mode
            if dataset.type != 'PascalVOCDataset':  # which looks for its files
                dataset = DATASETS.build({**dataset, 'lazy_init': True})
            metainfo = getattr(dataset, 'metainfo', None)
            metainfo = metainfo or DATASETS.get(dataset.type).METAINFO
            classes = metainfo['classes']
            assert len(classes) == cfg.model.decode_head.num_classes
    assert METRICS.build(cfg.val_evaluator) is not None
    # A runner makes it before the hooks.
    Visualizer.get_instance('test_segmentation_configs')
    for hook in [*cfg.default_hooks.values(), *cfg.custom_hooks]:
        HOOKS.build(hook)
    cfg, _ = small(cfg)
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    count = sum(len(group['params']) for group in optimizer.param_groups)
    assert count == len([p for p in model.parameters() if p.requires_grad])


def test_the_metafile():
    models = load(str(ROOT / 'configs/segmentation/metafile.yml'))['Models']
    assert sorted(model['Name'] for model in models) == NAMES
    for entry in models:
        cfg = Config.fromfile(str(ROOT / entry['Config']))
        # Segmenter's head reads numbers out of tensors as it is built.
        meta = 'segmenter' not in entry['Name']
        with torch.device('meta' if meta else 'cpu'):
            model = MODELS.build(cfg.model)
        count = sum(p.numel() for p in model.parameters())
        assert count == entry['Metadata']['Parameters'], entry['Name']


def test_not_in_the_model_hub():
    from mmpretrain.apis.model import ModelHub

    assert (
        'configs/segmentation/metafile.yml'
        in load(str(ROOT / 'model-index.yml'))['Import']
    )
    assert not [name for name in NAMES if ModelHub.has(name)]


def test_demo_resumes_exactly(tmp_path):
    options = [
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=9',
        'default_hooks.checkpoint.interval=1',
        'train_dataloader.batch_size=2',
    ]
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={tmp_path}/data',
            f'{split}_dataloader.dataset.num_scenes=6',
        ]

    def train(work_dir, *resume):
        command(
            'train.py', DEMO, '--work-dir', work_dir, *resume, '--cfg-options', *options
        )
        return torch.load(work_dir / 'iter_2.pth', weights_only=False)['state_dict']

    whole = train(tmp_path / 'whole')
    first = tmp_path / 'whole' / 'iter_1.pth'
    resumed = train(tmp_path / 'resumed', '--resume', first)
    start = torch.load(first, weights_only=False)['state_dict']
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not all(torch.equal(whole[key], start[key]) for key in whole)
