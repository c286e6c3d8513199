import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from spvit_mm.explain import (
    BinarizedAttention,
    binarize,
    keep_offsets,
    offset_mass,
    record_attention,
)
from spvit_mm.models import SPViT
from spvit_mm.ops import expand_prior, flex

HW = (2, 3)
LOOKHERE = dict(type='LookHereSpatialPrior', views=('right', 'all'))
FORMS = {
    'add': dict(attn_cfg=dict(combine='add', strength=2.0)),
    'both': dict(attn_cfg=dict(combine='both')),
    'score': dict(attn_cfg=dict(init_score=2.0), qkv_bias=False),
    'masked product': dict(prior=LOOKHERE),
    'masked sum': dict(attn_cfg=dict(combine='add'), prior=LOOKHERE),
    'masked both': dict(attn_cfg=dict(combine='both'), prior=LOOKHERE),
}


def build(**kwargs):
    model = SPViT(
        dict(embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=8),
        img_size=(16, 24), patch_size=8, **{'num_spsa_layers': 2, **kwargs},
    )  # fmt: skip
    for param in model.parameters():
        nn.init.normal_(param, std=0.4)
    return model.double().eval()


@pytest.mark.parametrize('share_prior', ['none', 'heads', 'network'])
@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_mass_by_offset(share_prior, cls_token_layer):
    model = build(share_prior=share_prior, cls_token_layer=cls_token_layer)
    batches = [torch.randn(n, 3, 16, 24).double() for n in (2, 1)]
    masses, grid = offset_mass(model, batches)
    assert grid == HW
    assert list(masses) == ['layers.0.attn', 'layers.1.attn']
    expected = np.zeros((2, 3, 5))
    for x in batches:
        with record_attention(model) as recording:
            model(x)
        weights = recording.maps[1].weights.sum(0).detach().numpy()
        extra = weights.shape[-1] - 6
        for h, i, j in np.ndindex(2, 6, 6):
            dy, dx = j // 3 - i // 3, j % 3 - i % 3
            expected[h, dy + 1, dx + 2] += weights[h, i + extra, j + extra]
    expected /= expected.sum((1, 2), keepdims=True)
    table, mass = masses['layers.1.attn']
    np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-10)
    prior = model.prior if share_prior == 'network' else model.layers[1].attn.prior
    torch.testing.assert_close(table, prior(HW).expand(2, -1, -1).detach())


def test_kept_offsets():
    table = torch.tensor([[[1.0, 9.0, 2.0], [5.0, 0.0, 4.0], [7.0, 3.0, 8.0]]])
    mass = torch.full_like(table, 0.05)
    mass[0, 0, 1], mass[0, 2, 2] = 0.5, 0.15
    three = keep_offsets(table, mass, 3 / 9)
    # 9, 8, 7 and, always, the zero offset
    assert three.nonzero()[:, 1:].tolist() == [[0, 1], [1, 1], [2, 0], [2, 2]]
    by_mass = keep_offsets(table, mass, 0.6, by='mass')
    assert by_mass.nonzero()[:, 1:].tolist() == [[0, 1], [1, 1], [2, 2]]
    assert keep_offsets(table, mass, 1.0).all()
    assert keep_offsets(table, mass, 1e-6).sum() == 2


@pytest.mark.parametrize('share_prior', ['none', 'heads', 'network'])
def test_keeping_everything_changes_nothing(share_prior):
    model = build(share_prior=share_prior)
    x = torch.randn(2, 3, 16, 24).double()
    expected = model(x)[0]
    assert binarize(model, *offset_mass(model, [x]), 1.0) == pytest.approx((1, 1))
    torch.testing.assert_close(model(x)[0], expected)


@pytest.mark.parametrize('share_prior', ['none', 'network'])
@pytest.mark.parametrize('form', FORMS)
def test_every_form_stays_as_it_is_with_all_offsets(form, share_prior):
    model = build(**FORMS[form], share_prior=share_prior, coords_rescale=2.0)
    x = torch.randn(2, 3, 16, 24).double()
    expected = model(x)[0]
    torch.manual_seed(0)
    rescaled = model.train()(x)[0]
    model.eval()
    offsets, mass = binarize(model, *offset_mass(model, [x]), 1.0)
    assert mass == pytest.approx(1)
    assert (offsets < 0.8) == ('masked' in form)
    torch.testing.assert_close(model(x)[0], expected)
    torch.manual_seed(0)
    torch.testing.assert_close(model.train()(x)[0], rescaled)


def test_the_prior_of_the_product_ranks_else_that_of_the_sum():
    x = torch.randn(2, 3, 16, 24).double()
    product = build(**FORMS['both'])
    ranks, _ = offset_mass(product, [x])[0]['layers.1.attn']
    torch.testing.assert_close(ranks, product.layers[1].attn.prior(HW).detach())
    added = build(**FORMS['add'])
    ranks, _ = offset_mass(added, [x])[0]['layers.1.attn']
    bias = 2 * (added.layers[1].attn.prior(HW).detach() - 1)
    torch.testing.assert_close(ranks, bias)
    # A bias that is no spatial prior is not measured.
    with pytest.raises(ValueError, match='no prior to binarise'):
        offset_mass(build(attn_cfg=dict(type='RelativePositionAttention')), [x])
    with pytest.raises(ValueError, match='no prior to binarise'):
        offset_mass(build(attn_cfg=dict(type='RotaryPositionAttention')), [x])


@pytest.mark.parametrize('form', [name for name in FORMS if 'masked' in name])
@pytest.mark.parametrize('share', [0.5, 1.0])
@pytest.mark.parametrize('ones', [False, True])
def test_what_the_prior_masks_stays_masked(form, share, ones):
    model = build(**FORMS[form])
    x = torch.randn(2, 3, 16, 24).double()
    binarize(model, *offset_mass(model, [x]), share, ones=ones)
    layer = model.layers[0].attn
    visible = layer.attn.prior.keep(HW)
    assert not (layer.keep & ~visible).any()
    counts = visible.sum((1, 2)).tolist()
    kept = [math.ceil(share * count) for count in counts]
    assert layer.keep.sum((1, 2)).tolist() == kept
    # Also where it was made of other offsets.
    everywhere = torch.ones_like(visible)
    layer = BinarizedAttention(layer.attn, everywhere, HW, ones=ones)
    visible_only = BinarizedAttention(layer.attn, visible, HW, ones=ones)
    tokens = torch.randn(2, 6, 8).double()
    torch.testing.assert_close(layer(tokens, HW), visible_only(tokens, HW))


@pytest.mark.parametrize('form', FORMS)
def test_ones_are_neutral(form):
    """Vanilla attention over what is kept, however the prior enters."""
    model = build(**FORMS[form])
    attn = model.layers[0].attn
    keep = torch.ones(2, 3, 5, dtype=torch.bool)
    keep[1, :, 0] = False
    layer = BinarizedAttention(attn, keep, HW, ones=True)
    tokens = torch.randn(2, 6, 8).double()
    q, k, v = attn.project_qkv(tokens, HW)
    scores = q @ k.transpose(-2, -1) * attn.scale
    visible = attn.prior.keep(HW)
    keep = keep if visible is None else keep & visible
    pairs = expand_prior(keep, HW)
    weights = scores.masked_fill(~pairs, -torch.inf).softmax(-1)
    expected = attn.merge_heads(weights @ v, v)
    torch.testing.assert_close(layer(tokens, HW), expected)


@pytest.mark.skipif(flex.flex_attention is None, reason='torch < 2.5 has none')
@torch.no_grad()
def test_blocks_give_what_the_dense_mask_gives(monkeypatch):
    monkeypatch.setattr(flex, 'BACKEND', 'eager')
    flex._kernel.cache_clear()
    model = build().float()
    x = torch.randn(1, 3, 16, 24)
    masses = offset_mass(model, [x])
    dense, block = copy.deepcopy(model), model
    binarize(dense, *masses, 0.4, impl='dense')
    binarize(block, *masses, 0.4, impl='block')
    torch.testing.assert_close(block(x)[0], dense(x)[0], rtol=1e-4, atol=1e-5)
    assert flex._kernel.cache_info().currsize == 1
    flex._kernel.cache_clear()


@pytest.mark.parametrize('ones', [False, True])
def test_what_is_turned_off_gets_no_attention(ones):
    model = build(cls_token_layer=0)
    x = torch.randn(1, 3, 16, 24).double()
    offsets, mass = binarize(model, *offset_mass(model, [x]), 0.4, ones=ones)
    assert 0.4 <= offsets < 0.55
    assert 0 < mass < 1
    layer = model.layers[0].attn
    assert isinstance(layer, BinarizedAttention)
    tokens = torch.randn(1, 7, 8).double().requires_grad_()
    out = layer(tokens, HW)[0]
    for i in range(6):
        reached = torch.autograd.grad(out[1 + i].sum(), tokens, retain_graph=True)[0]
        for j in range(6):
            dy, dx = j // 3 - i // 3, j % 3 - i % 3
            kept = bool(layer.keep[:, dy + 1, dx + 2].any())
            assert bool(reached[0, 1 + j].abs().sum() > 0) == kept
    prior = layer.attn.prior
    model(x)[0].sum().backward()
    assert (prior.w1.grad is None) == ones


def test_bad_arguments():
    model = build()
    x = torch.randn(1, 3, 16, 24).double()
    masses = offset_mass(model, [x])
    with pytest.raises(ValueError, match=r'`share` must lie in \(0, 1\]'):
        binarize(model, *masses, 0.0)
    with pytest.raises(ValueError, match="'offsets', 'mass'"):
        binarize(model, *masses, 0.5, by='rows')
    with pytest.raises(ValueError, match='no SP-SA layer'):
        offset_mass(build(num_spsa_layers=0), [x])
    with pytest.raises(ValueError, match='one size'):
        offset_mass(model, [x, torch.randn(1, 3, 24, 24).double()])
    attn = model.layers[0].attn
    with pytest.raises(ValueError, match='keep the zero offset'):
        BinarizedAttention(attn, torch.zeros(2, 3, 5, dtype=torch.bool), HW)
    binarize(model, *masses, 0.5)
    with pytest.raises(ValueError, match='binarised before'):
        binarize(model, *masses, 0.5)
    with pytest.raises(ValueError, match=r'grid of 2 x 3 patches, and the image has 3'):
        model(torch.randn(1, 3, 24, 24).double())
