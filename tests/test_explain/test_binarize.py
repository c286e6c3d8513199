import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from spvit_mm.explain import (
    collect_priors,
    keep_offsets,
    offset_mass,
    record_attention,
    sparsify,
)
from spvit_mm.explain.binarize import mean_kept
from spvit_mm.models import SPViT
from spvit_mm.ops import expand_prior, flex

HW = (2, 3)
LOOKHERE = dict(type='LookHereSpatialPrior', views=('right', 'all'))
WINDOW = dict(type='WindowSpatialPrior', window=4, shift=[(1, 0), (0, 0)], masked=True)
FORMS = {
    'add': dict(attn_cfg=dict(combine='add', strength=2.0)),
    'both': dict(attn_cfg=dict(combine='both')),
    'score': dict(attn_cfg=dict(init_score=2.0), qkv_bias=False),
    'masked product': dict(prior=WINDOW),
    'masked sum': dict(attn_cfg=dict(combine='add'), prior=LOOKHERE),
    'masked both': dict(attn_cfg=dict(combine='both'), prior=WINDOW),
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


@pytest.mark.parametrize('form', FORMS)
def test_mass_of_every_form_is_that_of_the_map(form):
    model = build(**FORMS[form])
    x = torch.randn(2, 3, 24, 24).double()  # a grid of 3 x 3
    masses, grid = offset_mass(model, [x])
    assert grid == (3, 3)
    with record_attention(model) as recording:
        model(x)
    for m in recording.maps[:2]:
        weights = m.weights.sum(0).detach().numpy()
        expected = np.zeros((2, 5, 5))
        for h, i, j in np.ndindex(2, 9, 9):
            dy, dx = j // 3 - i // 3, j % 3 - i % 3
            expected[h, dy + 2, dx + 2] += weights[h, i, j]
        expected /= expected.sum((1, 2), keepdims=True)
        np.testing.assert_allclose(masses[m.name].mass.numpy(), expected, rtol=1e-10)
    assert not any(module._forward_pre_hooks for module in model.modules())


def draw_mass(heads, rows, cols, holes=False):
    table = torch.randn(heads, rows, cols).double()
    mass = torch.rand(heads, rows, cols).double() ** 3
    if holes:  # what the prior masks has no mass
        masked = torch.rand(heads, rows, cols) < 0.3
        masked[:, rows // 2, cols // 2] = False
        table[masked], mass[masked] = -torch.inf, 0.0
    return table, mass / mass.sum((1, 2), keepdim=True)


@pytest.mark.parametrize('share', [0.05, 0.5, 0.8, 0.98])
@pytest.mark.parametrize('holes', [False, True])
def test_fewest_offsets_of_a_mass(share, holes):
    """Against all sets of offsets that hold the zero offset."""
    table, mass = draw_mass(3, 3, 3, holes)
    keep = keep_offsets(table, mass, share, by='fewest')
    assert not (keep & (table == -torch.inf)).any()
    for head in range(3):
        value = mass[head].flatten().tolist()
        others = [i for i in range(9) if i != 4]
        assert keep[head].flatten()[4]
        assert float((mass * keep)[head].sum()) >= share - 1e-9
        fewest = next(
            n
            for n in range(9)
            if max(
                sum(value[i] for i in chosen) + value[4]
                for chosen in itertools.combinations(others, n)
            )
            >= share - 1e-9
        )
        assert int(keep[head].sum()) == fewest + 1


@pytest.mark.parametrize('share', [0.05, 0.5, 0.8, 0.98])
@pytest.mark.parametrize('side', [3, 10])
def test_smallest_window_of_a_mass(share, side):
    """Against all rectangles around the query."""
    height, width = side, 4
    table, mass = draw_mass(2, 2 * height - 1, 2 * width - 1)
    keep = keep_offsets(table, mass, share, by='window')
    for head in range(2):
        found = []
        for up, down in itertools.product(range(height), repeat=2):
            for left, right in itertools.product(range(width), repeat=2):
                rows = slice(height - 1 - up, height + down)
                cols = slice(width - 1 - left, width + right)
                if float(mass[head, rows, cols].sum()) < share - 1e-9:
                    continue
                keys = min(height, min(8, height) + up + down)
                keys *= min(width, min(8, width) + left + right)
                found.append((keys, (up + down + 1) * (left + right + 1)))
        dy, dx = keep[head].nonzero().T - torch.tensor([[height - 1], [width - 1]])
        up, down, left, right = -dy.min(), dy.max(), -dx.min(), dx.max()
        area = int((up + down + 1) * (left + right + 1))
        keys = min(height, min(8, height) + int(up + down))
        keys *= min(width, min(8, width) + int(left + right))
        assert (keys, area) == min(found)
        assert int(keep[head].sum()) == area, 'a whole rectangle'
        assert min(up, down, left, right) >= 0, 'around the query'
        assert float((mass * keep)[head].sum()) >= share - 1e-9


@pytest.mark.parametrize('by', ['fewest', 'window'])
@pytest.mark.parametrize('form', FORMS)
def test_a_sparse_model_attends_to_what_it_keeps(form, by):
    """Masks that the attention map respects, on models with and without a buffer."""
    cfg = dict(FORMS[form])
    masked = dict(cfg, attn_cfg=dict(cfg.get('attn_cfg', {}), masked=True))
    model = build(**masked)
    x = torch.randn(2, 3, 16, 24).double()
    masses, grid = offset_mass(model, [x])
    other = build(**cfg)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith('.kept')}
    other.load_state_dict(state)
    kept = sparsify(model, masses, 0.7, by)
    sparsify(other, masses, 0.7, by)
    with record_attention(model) as recording:
        plain = model(x)[0]
    torch.testing.assert_close(model(x)[0], plain)
    torch.testing.assert_close(other(x)[0], plain)
    assert [layer.name for layer in kept] == list(masses)
    for i, layer in enumerate(kept):
        assert torch.equal(layer.keep, model.layers[i].attn.kept)
        assert (layer.mass >= 0.7 - 1e-9).all()
        pairs = expand_prior(layer.keep, grid)
        assert recording.maps[i].weights.mul(~pairs).abs().max() == 0
        torch.testing.assert_close(layer.pairs, pairs.double().mean((1, 2)))
    # Measured again, all of the attention is at the offsets that are kept.
    again, _ = offset_mass(model, [x])
    for layer in kept:
        assert again[layer.name].mass[~layer.keep].sum() == 0
    # and what a head masks is not drawn
    for drawn, layer in zip(
        collect_priors(model)[:: len(collect_priors(model)) // 2], kept, strict=True
    ):
        assert (np.isnan(drawn.table) == (~layer.keep).numpy()).all()


@pytest.mark.parametrize('share_prior', ['heads', 'network'])
def test_what_shares_a_prior_has_masks_of_its_own(share_prior):
    model = build(share_prior=share_prior, attn_cfg=dict(masked=True))
    x = torch.randn(1, 3, 16, 24).double()
    first, second = sparsify(model, offset_mass(model, [x])[0], 0.5)
    assert not torch.equal(first.keep[0], first.keep[1])
    assert not torch.equal(first.keep, second.keep)
    drawn = [np.isnan(prior.table) for prior in collect_priors(model)]
    if share_prior == 'heads':
        wanted = [~layer.keep.any(0, keepdim=True) for layer in (first, second)]
    else:
        wanted = [~(first.keep | second.keep)]
    assert [d.tolist() for d in drawn] == [w.tolist() for w in wanted]


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
    kept = sparsify(model, offset_mass(model, [x])[0], 1.0)
    assert mean_kept(kept) == pytest.approx((1, 1, 1))
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
    offsets, _, mass = mean_kept(sparsify(model, offset_mass(model, [x])[0], 1.0))
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
    sparsify(model, offset_mass(model, [x])[0], share, 'offsets', ones)
    attn = model.layers[0].attn
    visible = attn.prior.keep(HW)
    assert not (attn.kept & ~visible).any()
    counts = visible.sum((1, 2)).tolist()
    kept = [math.ceil(share * count) for count in counts]
    assert attn.kept.sum((1, 2)).tolist() == kept
    # Also where it was made of other offsets.
    tokens = torch.randn(2, 6, 8).double()
    attn.set_kept(visible)
    expected = attn(tokens, HW)
    attn.set_kept(torch.ones_like(visible))
    torch.testing.assert_close(attn(tokens, HW), expected)


@pytest.mark.parametrize('form', FORMS)
def test_ones_are_neutral(form):
    """Vanilla attention over what is kept, however the prior enters."""
    model = build(**FORMS[form])
    masses, _ = offset_mass(model, [torch.randn(2, 3, 16, 24).double()])
    keep = sparsify(model, masses, 0.7, ones=True)[0].keep
    attn = model.layers[0].attn
    tokens = torch.randn(2, 6, 8).double()
    q, k, v = attn.project_qkv(tokens, HW)
    scores = q @ k.transpose(-2, -1) * attn.scale
    pairs = expand_prior(keep, HW)
    weights = scores.masked_fill(~pairs, -torch.inf).softmax(-1)
    expected = attn.merge_heads(weights @ v, v)
    torch.testing.assert_close(attn(tokens, HW), expected)


@pytest.mark.skipif(flex.flex_attention is None, reason='torch < 2.5 has none')
@torch.no_grad()
def test_blocks_give_what_the_dense_mask_gives(monkeypatch):
    monkeypatch.setattr(flex, 'BACKEND', 'eager')
    flex._kernel.cache_clear()
    model = build().float()
    x = torch.randn(1, 3, 16, 24)
    sparsify(model, offset_mass(model, [x])[0], 0.4)
    dense, block = copy.deepcopy(model), model
    for one, impl in ((dense, 'eager'), (block, 'flex')):
        for layer in one.layers[:2]:
            layer.attn.attn_impl = impl
    torch.testing.assert_close(block(x)[0], dense(x)[0], rtol=1e-4, atol=1e-5)
    assert flex._kernel.cache_info().currsize == 1
    flex._kernel.cache_clear()


@pytest.mark.parametrize('ones', [False, True])
def test_what_is_turned_off_gets_no_attention(ones):
    model = build(cls_token_layer=0)
    x = torch.randn(1, 3, 16, 24).double()
    kept = sparsify(model, offset_mass(model, [x])[0], 0.4, 'offsets', ones)
    offsets, _, mass = mean_kept(kept)
    assert 0.4 <= offsets < 0.55
    assert 0 < mass < 1
    layer = model.layers[0].attn
    tokens = torch.randn(1, 7, 8).double().requires_grad_()
    out = layer(tokens, HW)[0]
    for i in range(6):
        reached = torch.autograd.grad(out[1 + i].sum(), tokens, retain_graph=True)[0]
        for j in range(6):
            dy, dx = j // 3 - i // 3, j % 3 - i % 3
            kept = bool(layer.kept[:, dy + 1, dx + 2].any())
            assert bool(reached[0, 1 + j].abs().sum() > 0) == kept
    model(x)[0].sum().backward()
    assert (layer.prior.w1.grad.abs().max() == 0) == ones


def test_bad_arguments():
    model = build()
    x = torch.randn(1, 3, 16, 24).double()
    masses, _ = offset_mass(model, [x])
    with pytest.raises(ValueError, match=r'`share` must lie in \(0, 1\]'):
        sparsify(model, masses, 0.0)
    with pytest.raises(ValueError, match="'offsets', 'mass', 'fewest', 'window'"):
        sparsify(model, masses, 0.5, by='rows')
    with pytest.raises(ValueError, match='no SP-SA layer'):
        offset_mass(build(num_spsa_layers=0), [x])
    with pytest.raises(ValueError, match='one size'):
        offset_mass(model, [x, torch.randn(1, 3, 24, 24).double()])
