"""The kernel of near keys: the formula, whatever is kept, and only near pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvit_mm.ops import local as local_module
from spvit_mm.ops import spatial_prior_attention
from spvit_mm.ops.local import Reach, group_heads, kept_share, local_attention, reaches

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


@pytest.mark.parametrize('kinds', KEPT)
@settings(max_examples=15, deadline=None)
@given(
    case=cases, tile=st.sampled_from([1, 2, 3, 8]), step=st.sampled_from([1, 1 << 20])
)
def test_it_follows_the_formula(kinds, case, tile, step):
    before = local_module.TILE, local_module._STEP_BYTES
    local_module.TILE, local_module._STEP_BYTES = tile, step
    try:
        check_against_formula('local', kinds, case)
    finally:
        local_module.TILE, local_module._STEP_BYTES = before


@pytest.mark.parametrize('kinds', KEPT)
@pytest.mark.parametrize('hw', [(11, 6), (1, 19)])
def test_windows_of_several_reaches(kinds, hw, monkeypatch):
    """Heads of unlike reach, in one call, on a grid of many tiles."""
    monkeypatch.setattr(local_module, 'TILE', 3)
    q, k, v, _ = sample(2, 4, hw, 1, 8, 1, torch.float64)
    tables = sample_tables(kinds, hw, (4, 1, 4), torch.float64)
    sides = [(0, 0, 0, 0), (1, 2, 0, 4), (9, 9, 9, 9), (0, 3, 2, 0)]
    tables['keep'] = torch.cat([window(hw, *side) for side in sides])
    assert len(group_heads(reaches(tables['keep'], hw), hw)) > 1
    formula = dict(q=q, k=k, v=v, hw=hw, extra=1, scale=8**-0.5, **tables)
    out = spatial_prior_attention(
        q, k, v, hw=hw, **tables, num_extra_tokens=1, attn_impl='local'
    )
    assert_near(out, naive_attention(**formula), 1e-11, 'out')
    leaves = [q, k, v, *(tables[x] for x in ('prior', 'bias') if x in kinds)]
    grad = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad)
    for one, other in zip(got, want, strict=True):
        assert_near(one, other, 1e-10, 'gradient')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_biases_far_outside_the_range_of_exp(dtype, monkeypatch):
    monkeypatch.setattr(local_module, 'TILE', 2)
    hw, kinds = (5, 4), ('prior', 'bias', 'keep')
    q, k, v, _ = sample(2, 3, hw, 1, 8, 1, dtype)
    tables = sample_tables(kinds, hw, (3, 3, 3), dtype)
    with torch.no_grad():
        tables['bias'].uniform_(-100, 100)
        tables['bias'][1].sub_(120)
        tables['bias'][2].add_(120)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    formula = dict(q=q, k=k, v=v, hw=hw, extra=1, scale=8**-0.5, **tables)
    out = spatial_prior_attention(
        q, k, v, hw=hw, **tables, num_extra_tokens=1, attn_impl='local'
    )
    assert_near(out, naive_attention(**formula), tolerance, 'out')
    grad = torch.randn(out.shape, dtype=dtype)
    leaves = [q, k, v, tables['prior'], tables['bias']]
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad)
    size = max(x.abs().max().item() for x in want)
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).abs().max().item() <= 4 * tolerance * size


def test_dropout_is_repeated_in_the_backward_pass():
    hw = (9, 10)
    q, k, v, _ = sample(2, 2, hw, 1, 8, 1, torch.float64)
    keep = window(hw, 2, 2, 2, 2)

    def run(v):
        torch.manual_seed(0)
        return local_attention(q, k, v, None, None, keep, hw, 8**-0.5, 1, 0.4)

    out = run(v)
    # Linear in v with the same weights, so its gradient along v is its value.
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())


def test_no_tensor_of_all_pairs_is_made():
    """Neither there nor back: the largest is a few hundred keys for each query."""
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
        out = spatial_prior_attention(q, k, v, prior, hw, keep=keep)
        out.sum().backward()
    assert max(largest) < heads * tokens * tokens * 4 / 10


def test_reaches_and_groups():
    hw = (20, 30)
    keep = torch.cat([window(hw, 1, 2, 3, 4), window(hw, 0, 0, 0, 0)])
    assert reaches(keep, hw) == [Reach(1, 2, 3, 4), Reach(0, 0, 0, 0)]
    near, far = Reach(1, 1, 1, 1), Reach(19, 19, 29, 29)
    groups = group_heads([near, far, Reach(1, 1, 1, 2), far], hw)
    assert sorted(heads for heads, _ in groups) == [[0, 2], [1, 3]]
    assert kept_share(window(hw, 19, 19, 29, 29), hw) == 1
    # tiles of 8 x 8 queries and what lies 1 around them
    assert kept_share(window(hw, 1, 1, 1, 1), hw) == 100 / 600


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
