"""SPViT as a backbone of dense prediction, at any resolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS

ARCH = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)


def build(**kwargs):
    cfg = dict(
        type='mmpretrain.SPViT',
        arch=ARCH,
        img_size=32,
        patch_size=8,
        out_type='featmap',
    )
    model = MODELS.build({**cfg, **kwargs})
    model.init_weights()
    return wake(model).eval()


def wake(model):
    """Give every parameter a value: a new prior is 1 wherever it is asked."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    batch=st.integers(1, 2),
    stem=st.sampled_from(['patch', 'conv']),
    coords=st.sampled_from(['raw', 'scaled', 'clamped']),
    with_cls_token=st.booleans(),
)
def test_shapes(height, width, batch, stem, coords, with_cls_token):
    model = build(
        stem=stem,
        prior=dict(type='MLPSpatialPrior', hidden_dims=4, coords=coords),
        with_cls_token=with_cls_token,
        out_indices=(0, 1, 3),
    )
    with torch.no_grad():
        maps = model(torch.rand(batch, 3, height, width))
    grid = (-(-height // 8), -(-width // 8))
    assert [m.shape for m in maps] == [(batch, 16, *grid)] * 3
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap', 'raw'])
def test_a_segmentor_is_told_that_it_takes_maps(out_type):
    build(out_type=out_type)
    with DefaultScope.overwrite_default_scope('mmseg'):
        build()
        with pytest.raises(ValueError, match='necks and heads of mmseg take maps'):
            build(out_type=out_type)


@pytest.mark.parametrize('size', [(16, 64), (64, 16)])
def test_aspect_ratios_train(size):
    model = build(with_cp=True, with_peg=True).train()
    model(torch.rand(2, 3, *size))[0].square().mean().backward()
    for layer in model.layers[: model.num_spsa_layers]:
        assert layer.attn.prior.w1.grad.abs().sum() > 0


@pytest.mark.parametrize('coords', ['raw', 'scaled', 'clamped'])
def test_other_sizes_leave_the_training_size_alone(coords):
    model = build(
        stem='conv', with_peg=True, prior=dict(type='MLPSpatialPrior', coords=coords)
    )
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)[0]
        for size in ((64, 64), (17, 90), (8, 8), (128, 32)):
            model(torch.rand(1, 3, *size))
        assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize('coords', ['raw', 'scaled', 'clamped'])
def test_into_another_size_and_back(coords):
    """Without an absolute embedding nothing is resized, so nothing is lost."""
    prior = dict(type='MLPSpatialPrior', coords=coords)
    common = dict(prior=prior, pos_embed=None)
    model, other, back = (build(img_size=s, **common) for s in (32, (64, 48), 32))
    x = torch.rand(1, 3, 40, 32)
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x)[0], model(x)[0])
        back.load_state_dict(other.state_dict())
        assert torch.equal(back(x)[0], model(x)[0])


@pytest.mark.parametrize('arch', ['deit-tiny', 'spvit-small'])
def test_a_classifier_fits_but_for_its_head(arch, tmp_path, mmpretrain_scope):
    from spvit_mm.models import SPViT

    arch = {**SPViT.arch_zoo[arch], 'num_layers': 2}
    width = arch['embed_dims']
    with torch.no_grad():
        classifier = MODELS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
                backbone=dict(type='mmpretrain.SPViT', arch=arch, num_spsa_layers=1),
                head=dict(
                    type='mmpretrain.VisionTransformerClsHead',
                    num_classes=10,
                    in_channels=width,
                ),
            )
        )
        wake(classifier)
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict()), path)

    cfg = dict(
        type='mmpretrain.SPViT',
        arch=arch,
        num_spsa_layers=1,
        img_size=(512, 1024),
        out_type='featmap',
    )
    loaded = MODELS.build(cfg)
    keys = loaded.load_state_dict(classifier.backbone.state_dict())
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    model = MODELS.build(
        dict(
            **cfg,
            init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'),
        )
    )
    model.init_weights()
    assert model.pos_embed.shape == (1, 32 * 64, width)
    for name, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # its own tensors, not those of a random start
    source = classifier.backbone.state_dict()
    assert torch.equal(model.layers[0].attn.prior.w1, source['layers.0.attn.prior.w1'])
