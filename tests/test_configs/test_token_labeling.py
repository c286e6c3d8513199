"""The token-labeling configs build, train for a step, and have the paper's size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import HOOKS, METRICS, MODELS
from PIL import Image

CONFIGS = Path(__file__).parents[2] / 'configs'
FOLDER = CONFIGS / 'token_labeling'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
# REFERENCE: with both heads, 1000 classes, at 224 pixels.
PARAMETERS = {
    'spvit-small_8xb128-tokenlabel-300e_in1k': 26_234_468,
    'spvit-medium_8xb128-tokenlabel-300e_in1k': 55_969_440,
    'spvit-large_8xb100-tokenlabel-300e_in1k': 150_273_368,
}


def build_small(cfg):
    """The config's model with two layers; the full depth costs minutes."""
    backbone = cfg.model.backbone
    if isinstance(backbone.get('arch'), str):
        from spvit_mm.models import SPViT

        backbone.arch = {**SPViT.arch_zoo[backbone.arch], 'num_layers': 2}
        backbone.num_spsa_layers = 1
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.init_weights()
    return model


@pytest.mark.parametrize('name', NAMES)
def test_config(name, tmp_path, mmpretrain_scope):
    cfg = Config.fromfile(str(FOLDER / f'{name}.py'))
    image = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    path = str(tmp_path / 'image.png')
    Image.fromarray(image).save(path)
    num_classes = cfg.model.head.num_classes
    label_map = torch.rand(2, min(5, num_classes), 18, 18)
    label_map[1] = 1
    batches = {}
    for split in ('train', 'val'):
        pipeline = Compose(cfg[f'{split}_dataloader'].dataset.pipeline)
        info = dict(img_path=path, gt_label=1)
        if cfg[f'{split}_dataloader'].dataset.type == 'TokenLabelDataset':
            info.update(token_label=label_map.half(), num_classes=num_classes)
        sample = pipeline(info)
        batches[split] = dict(
            inputs=torch.stack([sample['inputs']] * 2)[..., :96, :96],
            data_samples=[sample['data_samples']] * 2,
        )
    assert ('tokenlabel' in name) == (
        'token_label' in batches['train']['data_samples'][0]
    )

    model = build_small(cfg)
    losses = model(**model.data_preprocessor(batches['train'], True), mode='loss')
    assert ('loss_dense' in losses) == ('tokenlabel' in name)
    sum(losses.values()).backward()
    idle = [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert idle == []
    model.eval()
    with torch.no_grad():
        predictions = model(**model.data_preprocessor(batches['val']), mode='predict')
    assert predictions[0].pred_score.shape == (num_classes,)
    METRICS.build(cfg.val_evaluator)
    for hook in cfg.get('custom_hooks', []):
        HOOKS.build(hook)


@pytest.mark.parametrize(('name', 'expected'), PARAMETERS.items())
def test_parameters(name, expected, mmpretrain_scope):
    cfg = Config.fromfile(str(FOLDER / f'{name}.py'))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_fine_tuning_loads_its_start(mmpretrain_scope):
    for path in FOLDER.glob('*-ft-30e_*.py'):
        start = Path(Config.fromfile(str(path)).load_from)
        assert (FOLDER / f'{start.parent.name}.py').exists()
        cfg = Config.fromfile(str(FOLDER / f'{start.parent.name}.py'))
        assert start.stem == f'epoch_{cfg.train_cfg.max_epochs}'
    small = Config.fromfile(str(FOLDER / 'spvit-small_8xb128-tokenlabel-300e_in1k.py'))
    large = Config.fromfile(
        str(FOLDER / 'spvit-small_8xb32-tokenlabel-ft-30e_in1k-384px.py')
    )
    source, target = build_small(small), build_small(large)
    torch.nn.init.normal_(source.backbone.pos_embed)
    target.load_state_dict(source.state_dict())
    assert target.backbone.pos_embed.shape[1] == 24 * 24
    assert target.backbone.pos_embed.std() > 0.5


FINE_TUNING = CONFIGS / 'classification' / 'sp-deit-small_1xb64-ft-50e_custom.py'


def test_fine_tuning_decays_the_learning_rate_by_depth(mmpretrain_scope):
    cfg = Config.fromfile(str(FINE_TUNING))
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    base = cfg.optim_wrapper.optimizer.lr

    def rate(name):
        return rates[id(model.get_parameter(name))]

    assert rate('head.layers.head.weight') == pytest.approx(base)
    prior = [
        n for n, _ in model.named_parameters() if '.layers.3.' in n and 'prior' in n
    ]
    assert rate(prior[0]) == pytest.approx(rate('backbone.layers.3.attn.qkv.weight'))
    assert rate('backbone.layers.3.attn.qkv.weight') == pytest.approx(
        base * 0.75 ** (12 - 3)
    )


def test_fine_tuning_of_the_priors_alone(mmpretrain_scope):
    cfg = Config.fromfile(str(FINE_TUNING))
    cfg.merge_from_dict({'model.backbone.freeze_all_but_priors': True})
    model = build_small(cfg)
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all('prior' in n or n.startswith('head.') for n in learning)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    in_optimizer = sum(
        p.numel()
        for group in wrapper.optimizer.param_groups
        for p in group['params']
        if p.requires_grad
    )
    assert in_optimizer == sum(model.get_parameter(n).numel() for n in learning)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    for _ in range(2):  # w2 starts at 0, so W1 learns from the second step on
        images = torch.randn(2, 3, 64, 96)
        loss = model.head(model.backbone(images)).pow(2).sum() + sum(
            model.head(model.backbone(images)).sum(1)
        )
        wrapper.update_params(loss)
    for name, param in model.named_parameters():
        if name not in learning:
            assert torch.equal(param, before[name]), name
