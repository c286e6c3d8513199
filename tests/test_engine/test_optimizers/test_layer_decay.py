import pytest
import torch.nn as nn
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS

NAME = 'mmpretrain.BackboneLayerDecayOptimWrapperConstructor'
ARCH = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32)


class Segmentor(nn.Module):
    """A model that, as those of mmseg, knows nothing of depths."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(
            dict(
                type='mmpretrain.SPViT',
                arch=ARCH,
                img_size=32,
                with_peg=True,
                out_type='featmap',
                **kwargs,
            )
        )
        self.decode_head = nn.Conv2d(16, 2, 1)


def groups(model, constructor=NAME, **paramwise):
    cfg = dict(
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
        constructor=constructor,
        paramwise_cfg=dict(layer_decay_rate=0.5, **paramwise),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        optimizer = build_optim_wrapper(model, cfg).optimizer
    return {group['param_name']: group for group in optimizer.param_groups}


@pytest.mark.parametrize('share_prior', ['none', 'network'])
def test_learning_rates(share_prior):
    model = Segmentor(share_prior=share_prior)
    found = groups(model, norm_decay_mult=0.0)
    # three layers, the stem before and the head behind them: depths 0..4
    for name, group in found.items():
        depth = 4
        if name.startswith('backbone.layers.'):
            depth = int(name.split('.')[2]) + 1
        elif name.startswith(
            tuple(f'backbone.{n}' for n in ('patch_', 'pos_', 'cls_', 'prior.'))
        ):
            depth = 0
        assert group['lr'] == pytest.approx(0.5 ** (4 - depth)), name
    assert found['decode_head.weight']['lr'] == 1
    assert found['backbone.layers.0.ln1.weight']['weight_decay'] == 0
    assert found['backbone.layers.0.peg.proj.weight']['lr'] == 0.125
    # every parameter once
    named = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    ids = [id(p) for group in found.values() for p in group['params']]
    assert sorted(ids) == sorted(named)


def test_classifiers_are_as_with_mmpretrains(mmpretrain_scope):
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmpretrain.SPViT', arch=ARCH, img_size=32),
            head=dict(
                type='mmpretrain.VisionTransformerClsHead',
                num_classes=2,
                in_channels=16,
            ),
        )
    )
    theirs = groups(model, 'mmpretrain.LearningRateDecayOptimWrapperConstructor')
    ours = groups(model)
    assert {n: g['lr'] for n, g in ours.items()} == {
        n: g['lr'] for n, g in theirs.items()
    }


def test_frozen_are_left_out():
    found = groups(Segmentor(frozen_stages=1))
    assert not [n for n in found if n.startswith('backbone.layers.0.')]
    assert [n for n in found if n.startswith('backbone.layers.1.')]


@pytest.mark.parametrize('model', [nn.Linear(2, 2), nn.Module()])
def test_no_depth_to_be_found(model):
    model.backbone = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match='`get_layer_depth`.*Conv2d has none'):
        groups(model)
