import sys

import numpy as np
import pytest
import torch
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS
from torch import nn

from spvit_mm.explain import (
    class_scores,
    draw_relevance,
    perturbation_test,
    record_attention,
    relevance_maps,
)

ATTENTIONS = [
    None,
    dict(type='GatedPositionalAttention'),
    dict(type='RelativePositionAttention'),
    dict(type='RotaryPositionAttention'),
    dict(combine='add'),
    dict(
        combine='both',
        prior=dict(type='LookHereProduct', views=('right', 'up', 'left', 'all')),
    ),
]


def build(**kwargs):
    backbone = dict(
        type='SPViT',
        arch=dict(embed_dims=16, num_layers=3, num_heads=4, feedforward_channels=16),
        img_size=(24, 32),
        patch_size=8,
        num_spsa_layers=2,
        **kwargs,
    )
    head = dict(type='LinearClsHead', num_classes=5, in_channels=16)
    if kwargs.get('out_type', 'cls_token') == 'cls_token':
        head['type'] = 'VisionTransformerClsHead'
    model = ImageClassifier(backbone, head=head).double()
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    model.eval()
    return model


def naive(model, x, target, method):
    """R <- R + E_h[(dA * A)^+] R in numpy, gradients by differences of each entry."""
    with record_attention(model) as recording:
        class_scores(model, x)
    maps = [m.weights[0].detach().numpy() for m in recording.maps]
    names = [m.name for m in recording.maps]
    chain = np.eye(maps[0].shape[-1])
    for name, a in zip(names, maps, strict=True):
        length = a.shape[-1]
        if len(chain) < length:
            grown = np.eye(length)
            grown[1:, 1:] = chain
            chain = grown
        if method == 'rollout':
            chain = (a.mean(0) + np.eye(length)) / 2 @ chain
            continue
        grad = attention_gradient(model, x, target, name, a)
        chain = chain + np.maximum(grad * a, 0).mean(0) @ chain
    return chain


def attention_gradient(model, x, target, name, a):
    """d logit / d A, the attention of one layer replaced by a leaf of its own."""
    module = model.get_submodule(name)
    leaf = torch.from_numpy(a)[None].clone().requires_grad_()

    def replaced(x, *_):
        b, t, c = x.shape
        qkv = module.qkv(x).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        return module.proj((leaf @ qkv[2]).transpose(1, 2).reshape(b, t, c))

    module.forward = replaced
    class_scores(model, x)[0, target].backward()
    del module.forward
    return leaf.grad[0].numpy()


@pytest.mark.parametrize('method', ['gradient', 'rollout'])
@pytest.mark.parametrize('attn_cfg', ATTENTIONS)
@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_is_the_rule_written_out(method, attn_cfg, cls_token_layer):
    model = build(attn_cfg=attn_cfg, cls_token_layer=cls_token_layer)
    x = torch.randn(1, 3, 24, 32).double()
    expected = naive(model, x, 3, method)[0, 1:].reshape(3, 4)
    got = relevance_maps(model, x, [3], method)[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


def test_averaging_model_and_vanilla_model():
    model = build(out_type='avg_featmap', with_cls_token=False)
    x = torch.randn(1, 3, 24, 32).double()
    expected = naive(model, x, 1, 'gradient').mean(0).reshape(3, 4)
    got = relevance_maps(model, x, [1])[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    plain = ImageClassifier(
        dict(type='VisionTransformer', arch='deit-tiny', img_size=32),
        head=dict(type='VisionTransformerClsHead', num_classes=5, in_channels=192),
    )
    assert relevance_maps(plain, torch.randn(2, 3, 32, 32)).shape == (2, 2, 2)


def test_token_label_classifier():
    model = MODELS.build(
        dict(
            type='TokenLabelClassifier',
            backbone=dict(
                type='SPViT',
                arch=dict(
                    embed_dims=16, num_layers=3, num_heads=4, feedforward_channels=16
                ),
                img_size=24,
                patch_size=8,
                out_type='raw',
            ),
            head=dict(type='TokenLabelClsHead', num_classes=5, in_channels=16),
        )
    )
    maps = relevance_maps(model, torch.randn(2, 3, 24, 24))
    assert maps.shape == (2, 3, 3)
    assert maps.std() > 0


def test_default_target_is_the_prediction_and_nothing_is_left_behind():
    model = build()
    for param in model.parameters():
        param.requires_grad = False
    model.backbone.train()
    x = torch.randn(3, 3, 24, 32).double()
    predicted = class_scores(model, x).argmax(1)
    got = relevance_maps(model, x)
    assert torch.equal(got, relevance_maps(model, x, predicted))
    assert model.backbone.training
    assert not model.head.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


class Lookup(nn.Module):
    """Class 1 if the upper left patch is bright, else class 0."""

    backbone = head = None

    def forward(self, x, mode):
        bright = x[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack((torch.full_like(bright, 0.5), bright), dim=1)


def test_perturbation_finds_the_patch_that_matters():
    x = torch.ones(4, 3, 8, 8)
    right = torch.zeros(4, 2, 2)
    right[:, 0, 0] = 1
    good = perturbation_test(Lookup(), x, [1] * 4, right, steps=5)
    assert good.removed == pytest.approx([0, 0.225, 0.45, 0.675, 0.9])
    assert good.most.tolist() == [1, 0, 0, 0, 0]
    # at a share of 0.9 of four patches, all four are gone
    assert good.least.tolist() == [1, 1, 1, 1, 0]
    assert good.most_area == pytest.approx(0.125)
    assert good.least_area == pytest.approx(0.875)
    bad = perturbation_test(Lookup(), x, [1] * 4, 1 - right, steps=5)
    assert bad.most_area > bad.least_area


def test_perturbation_takes_a_batch_at_a_time():
    class Counting(Lookup):
        most = 0

        def forward(self, x, mode):
            Counting.most = max(Counting.most, len(x))
            return super().forward(x, mode)

    x, maps = torch.rand(150, 3, 8, 8), torch.rand(150, 2, 2)
    found = perturbation_test(Counting(), x, [1] * 150, maps, steps=3)
    assert Counting.most == 64
    parts = [
        perturbation_test(Lookup(), x[i : i + 50], [1] * 50, maps[i : i + 50], steps=3)
        for i in (0, 50, 100)
    ]
    np.testing.assert_allclose(found.most, np.mean([p.most for p in parts], axis=0))


def test_a_model_that_loses_tokens_on_the_way():
    backbone = dict(type='mmpretrain.T2T_ViT', img_size=64, embed_dims=32, num_layers=2)
    backbone.update(
        layer_cfgs=dict(num_heads=2, feedforward_channels=32),
        t2t_cfg=dict(token_dims=16, use_performer=False),
    )
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    model = ImageClassifier(backbone, head=head)
    for method in ('gradient', 'rollout'):
        with pytest.raises(ValueError, match='T2T_ViT does not have one grid'):
            relevance_maps(model, torch.rand(1, 3, 64, 64), method=method)


def test_gradcam(monkeypatch):
    pytest.importorskip('pytorch_grad_cam')
    model = build().float()
    x = torch.randn(2, 3, 24, 32)
    maps = relevance_maps(model, x, [0, 1], 'gradcam')
    assert maps.shape == (2, 3, 4)
    assert maps.min() >= 0
    assert maps.std() > 0
    # By hand: channels weighted by their mean gradient, negative parts cut off.
    kept = []
    layer = model.backbone.layers[-1].ln1
    handle = layer.register_forward_hook(lambda m, i, o: kept.append(o))
    score = class_scores(model, x)[range(2), [0, 1]].sum()
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept)
    weight = grad[:, 1:].mean(1, keepdim=True)
    expected = (weight * kept[0][:, 1:]).sum(-1).clamp(min=0).view(2, 3, 4)
    for a, b in zip(maps, expected, strict=True):
        assert np.corrcoef(a.flatten(), b.detach().flatten())[0, 1] > 0.9


def test_gradcam_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    with pytest.raises(ImportError, match='pip install grad-cam'):
        relevance_maps(build(), torch.randn(1, 3, 24, 32).double(), None, 'gradcam')


def test_bad_arguments():
    model, x = build(), torch.randn(2, 3, 24, 32).double()
    with pytest.raises(ValueError, match="'gradient', 'rollout', 'gradcam'"):
        relevance_maps(model, x, method='lime')
    with pytest.raises(ValueError, match=r'a class in 0\.\.4 for each of the 2'):
        relevance_maps(model, x, [0, 5])
    with pytest.raises(ValueError, match=r'for each of the 2 images, got \[1\]'):
        relevance_maps(model, x, [1])
    with pytest.raises(ValueError, match='image classifier with backbone and head'):
        relevance_maps(model.backbone, x)
    with pytest.raises(ValueError, match='`steps`'):
        perturbation_test(model, x, [0, 1], torch.ones(2, 3, 4), steps=1)


def test_overlay(tmp_path):
    picture = np.full((24, 32, 3), 200, np.uint8)
    figure = draw_relevance([picture], [('a', torch.eye(3, 4)[None])], [['word']])
    assert [ax.get_xlabel() for ax in figure.axes] == ['', 'word']
    figure.savefig(tmp_path / 'overlay.png')
