"""Every config builds its model and its pipelines, and survives a forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.visualization import Visualizer
from mmpretrain.registry import HOOKS, METRICS, MODELS

CONFIGS = Path(__file__).parents[2] / 'configs'
CLASSIFICATION = sorted(
    str(path.relative_to(CONFIGS)) for path in (CONFIGS / 'classification').glob('*.py')
)


def small_data(cfg, split, tmp_path):
    """What the dataset of a config would hand to its pipeline."""
    size = cfg.model.backbone.img_size
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    pipeline = cfg[f'{split}_dataloader'].dataset.pipeline
    if not any('Resize' in step.type for step in pipeline):
        # a data set whose images have the model's size
        image = np.ascontiguousarray(image[:size, :size])
    if pipeline[0].type == 'LoadImageFromFile':
        from PIL import Image

        Image.fromarray(image).save(tmp_path / 'image.png')
        return dict(img_path=str(tmp_path / 'image.png'), gt_label=1)
    return dict(img=image[:size, :size], gt_label=1)


@pytest.mark.parametrize('name', CLASSIFICATION)
def test_classification_config(name, tmp_path, mmpretrain_scope):
    cfg = Config.fromfile(str(CONFIGS / name))
    batches = {}
    for split in ('train', 'val', 'test'):
        pipeline = Compose(cfg[f'{split}_dataloader'].dataset.pipeline)
        sample = pipeline(small_data(cfg, split, tmp_path))
        batches[split] = dict(
            inputs=torch.stack([sample['inputs']] * 2),
            data_samples=[sample['data_samples']] * 2,
        )
    size = cfg.model.backbone.img_size
    assert batches['val']['inputs'].shape == (2, 3, size, size)

    # The full depth and size cost minutes over all configs: two layers of the
    # config's own shape, on a crop of its images.
    for batch in batches.values():
        batch['inputs'] = batch['inputs'][..., :96, :96]
    backbone = cfg.model.backbone
    arch = backbone.arch
    if isinstance(arch, str):
        from spvit_mm.models import SPViT

        backbone.arch = {**SPViT.arch_zoo[arch], 'num_layers': 2}
        backbone.num_spsa_layers = 0 if backbone.get('num_spsa_layers') == 0 else 1
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    for module in model.modules():
        if hasattr(module, 'reset_parameters') and hasattr(module, 'relation'):
            # neutral at the start, unless the config asks for the local one
            neutral = module((2, 3)).eq(1).all()
            assert neutral == (getattr(module, 'init', 'released') != 'local')
    data = model.data_preprocessor(batches['train'], training=True)
    losses = model(**data, mode='loss')
    assert losses['loss'].isfinite()
    losses['loss'].backward()
    model.eval()
    data = model.data_preprocessor(batches['val'])
    with torch.no_grad():
        predictions = model(**data, mode='predict')
    assert predictions[0].pred_score.shape == (cfg.model.head.num_classes,)

    # A runner makes it before the hooks.
    Visualizer.get_instance('test_configs')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        METRICS.build(evaluator)
    for hook in [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]:
        HOOKS.build(hook)
