"""The kernel of near keys: the formula, whatever is kept, and only near pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvit_mm.ops import chunked as chunked_module
from spvit_mm.ops import local as local_module
from spvit_mm.ops import spatial_prior_attention
from spvit_mm.ops.chunked import Reach, band_share, plan_bands
from spvit_mm.ops.local import (
    group_heads,
    local_attention,
    local_cost,
    reaches,
    tile_share,
)

from .test_attention import (
    KINDS,
    assert_near,
    cases,
    check_against_formula,
    naive_attention,
    naive_gradients,
    sample,
    sample_tables,
)

KEPT = [kinds for kinds in KINDS if 'keep' in kinds]


def window(hw, up, down, left, right):
    """The offsets of a rectangle around the query, (1, 2H-1, 2W-1)."""
    dy = torch.arange(1 - hw[0], hw[0])[:, None]
    dx = torch.arange(1 - hw[1], hw[1])
    return ((-up <= dy) & (dy <= down) & (-left <= dx) & (dx <= right))[None]


# How a call is cut: what a pair of a tile costs decides. Bands take no extra tokens.
CUTS = {'tiles': 0.0, 'bands': 1e9}
EACH_CUT = pytest.mark.parametrize(('cut', 'extra'), [('tiles', 1), ('bands', 0)])


@pytest.mark.parametrize('kinds', KEPT)
@settings(max_examples=25, deadline=None)
@given(
    case=cases,
    cut=st.sampled_from(sorted(CUTS)),
    tile=st.sampled_from([1, 2, 3, 8]),
    queries=st.sampled_from([1, 7, 128]),
    step=st.sampled_from([1, 1 << 20]),
)
def test_it_follows_the_formula(kinds, case, cut, tile, queries, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_module, '_TILE_PAIR', CUTS[cut])
        patch.setattr(local_module, 'TILE', tile)
        patch.setattr(local_module, '_STEP_BYTES', step)
        patch.setattr(chunked_module, '_BAND_QUERIES', queries)
        check_against_formula('local', kinds, case)


@pytest.mark.parametrize('kinds', KEPT)
@pytest.mark.parametrize('hw', [(11, 6), (1, 19)])
@EACH_CUT
def test_windows_of_several_reaches(kinds, hw, cut, extra, monkeypatch):
    """Heads of unlike reach, in one call, on a grid of many tiles or bands."""
    monkeypatch.setattr(local_module, '_TILE_PAIR', CUTS[cut])
    monkeypatch.setattr(local_module, 'TILE', 3)
    monkeypatch.setattr(chunked_module, '_BAND_QUERIES', 12)
    q, k, v, _ = sample(2, 4, hw, extra, 8, 1, torch.float64)
    tables = sample_tables(kinds, hw, (4, 1, 4), torch.float64)
    sides = [(0, 0, 0, 0), (1, 2, 0, 4), (9, 9, 9, 9), (0, 3, 2, 0)]
    tables['keep'] = torch.cat([window(hw, *side) for side in sides])
    assert len(group_heads(reaches(tables['keep'], hw), hw)) > 1
    formula = dict(q=q, k=k, v=v, hw=hw, extra=extra, scale=8**-0.5, **tables)
    out = spatial_prior_attention(
        q, k, v, hw=hw, **tables, num_extra_tokens=extra, attn_impl='local'
    )
    assert_near(out, naive_attention(**formula), 1e-11, 'out')
    leaves = [q, k, v, *(tables[x] for x in ('prior', 'bias') if x in kinds)]
    grad = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad)
    for one, other in zip(got, want, strict=True):
        assert_near(one, other, 1e-10, 'gradient')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@EACH_CUT
def test_biases_far_outside_the_range_of_exp(dtype, cut, extra, monkeypatch):
    monkeypatch.setattr(local_module, '_TILE_PAIR', CUTS[cut])
    monkeypatch.setattr(local_module, 'TILE', 2)
    monkeypatch.setattr(chunked_module, '_BAND_QUERIES', 8)
    hw, kinds = (5, 4), ('prior', 'bias', 'keep')
    q, k, v, _ = sample(2, 3, hw, extra, 8, 1, dtype)
    tables = sample_tables(kinds, hw, (3, 3, 3), dtype)
    with torch.no_grad():
        tables['bias'].uniform_(-100, 100)
        tables['bias'][1].sub_(120)
        tables['bias'][2].add_(120)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    formula = dict(q=q, k=k, v=v, hw=hw, extra=extra, scale=8**-0.5, **tables)
    out = spatial_prior_attention(
        q, k, v, hw=hw, **tables, num_extra_tokens=extra, attn_impl='local'
    )
    assert_near(out, naive_attention(**formula), tolerance, 'out')
    grad = torch.randn(out.shape, dtype=dtype)
    leaves = [q, k, v, tables['prior'], tables['bias']]
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad)
    size = max(x.abs().max().item() for x in want)
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).abs().max().item() <= 4 * tolerance * size


@EACH_CUT
def test_dropout_is_repeated_in_the_backward_pass(cut, extra, monkeypatch):
    monkeypatch.setattr(local_module, '_TILE_PAIR', CUTS[cut])
    monkeypatch.setattr(chunked_module, '_BAND_QUERIES', 20)
    hw = (9, 10)
    q, k, v, _ = sample(2, 2, hw, extra, 8, 1, torch.float64)
    keep = window(hw, 2, 2, 2, 2)

    def run(v):
        torch.manual_seed(0)
        return local_attention(q, k, v, None, None, keep, hw, 8**-0.5, extra, 0.4)

    out = run(v)
    # Linear in v with the same weights, so its gradient along v is its value.
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())


@pytest.mark.parametrize('cut', CUTS)
def test_no_tensor_of_all_pairs_is_made(cut, monkeypatch):
    """Neither there nor back: the largest is a few hundred keys for each query."""
    monkeypatch.setattr(local_module, '_TILE_PAIR', CUTS[cut])
    hw, heads = (48, 48), 2
    tokens = hw[0] * hw[1]
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.untyped_storage().nbytes())
            return out

    q, k, v, _ = sample(1, heads, hw, 0, 8, 1, torch.float32)
    keep = window(hw, 3, 3, 3, 3)
    prior = torch.rand(heads, *keep.shape[1:], requires_grad=True)
    with Watch():
        out = spatial_prior_attention(q, k, v, prior, hw, keep=keep, attn_impl='local')
        out.sum().backward()
    assert max(largest) < heads * tokens * tokens * 4 / 10


def test_reaches_and_groups():
    hw = (20, 30)
    keep = torch.cat([window(hw, 1, 2, 3, 4), window(hw, 0, 0, 0, 0)])
    assert reaches(keep, hw) == [Reach(1, 2, 3, 4), Reach(0, 0, 0, 0)]
    near, far = Reach(1, 1, 1, 1), Reach(19, 19, 29, 29)
    groups = group_heads([near, far, Reach(1, 1, 1, 2), far], hw)
    assert sorted(heads for heads, _ in groups) == [[0, 2], [1, 3]]
    assert tile_share([far], hw) == 1
    # tiles of 8 x 8 queries and what lies 1 around them
    assert tile_share([near], hw) == 100 / 600


def test_bands():
    hw = (20, 30)
    near, far = Reach(1, 1, 1, 1), Reach(19, 19, 29, 29)
    # 128 queries are 4 rows; the far head has bands of its own
    bands = plan_bands([near, Reach(1, 2, 0, 0), far, near], hw, 4, 1)
    assert [(x.heads.start, x.heads.stop) for x in bands] == [(0, 2), (2, 3), (3, 4)]
    assert [x.keys(hw) for x in bands] == [7, 20, 6]
    assert band_share([near], hw) == 6 / 20
    assert band_share([far], hw) == 1


def test_the_cheaper_cut_is_taken():
    """Tiles on large grids and with extra tokens, bands on small ones."""
    small, large = (24, 24), (64, 64)
    keep = {hw: window(hw, 7, 7, 7, 7) for hw in (small, large)}
    bands = {hw: band_share(reaches(keep[hw], hw), hw) for hw in keep}
    assert local_cost(keep[small], small, 0) == bands[small]
    assert local_cost(keep[small], small, 1) > bands[small]
    assert local_cost(keep[large], large, 0) < bands[large]


def test_auto_takes_it_where_little_is_kept(monkeypatch):
    attention = __import__('sys').modules['spvit_mm.ops.attention']
    called = []
    monkeypatch.setattr(
        attention,
        'local_attention',
        lambda *args: called.append(1) or local_attention(*args),
    )
    hw = (24, 24)
    q, k, v, _ = sample(1, 2, hw, 0, 8, 1, torch.float32)
    spatial_prior_attention(q, k, v, None, hw, keep=window(hw, 12, 12, 12, 12))
    assert not called
    spatial_prior_attention(q, k, v, None, hw, keep=window(hw, 1, 1, 1, 1))
    assert called


def test_it_needs_a_mask():
    q, k, v, prior = sample(1, 2, (3, 3), 0, 8, 1, torch.float32)
    with pytest.raises(ValueError, match="'local' computes what `keep` keeps"):
        spatial_prior_attention(q, k, v, prior, (3, 3), attn_impl='local')
