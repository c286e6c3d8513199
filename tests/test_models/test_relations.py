import copy
import math
import pickle

import numpy as np
import pytest
import torch
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import nn
from torch.func import functional_call

from spvit_mm.models import (
    LinearSpatialPrior,
    SpatialPriorAttention,
    TableSpatialPrior,
    WindowSpatialPrior,
)
from spvit_mm.models.priors.simple import resize_table

GRIDS = [(1, 1), (1, 5), (4, 1), (3, 3), (2, 5), (4, 3)]
HEADS = 3


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def linear(prior, head, x, y, hw):
    a, b = prior.slope[head].tolist(), prior.bias[head].item()
    return a[0] * x + a[1] * y + b


def table(prior, head, x, y, hw):
    """Bilinear, in a loop over all entries: their hat functions at (x, y)."""
    height, width = prior.grid
    if prior.coords == 'scaled':
        x, y = x * width / hw[1], y * height / hw[0]
    x = min(max(x, 1 - width), width - 1)
    y = min(max(y, 1 - height), height - 1)
    value = 0.0
    for i, row in enumerate(prior.table[head].tolist()):
        for j, entry in enumerate(row):
            hat_y = max(0.0, 1 - abs(y - (i - height + 1)))
            hat_x = max(0.0, 1 - abs(x - (j - width + 1)))
            value += entry * hat_y * hat_x
    return value


def window(prior, head, x, y, hw):
    half = prior.half_size.view(-1, 2)[head].tolist()
    shift = prior.shift.view(-1, 2)[head].tolist()

    def inside(sides):
        away = [abs(r - s) for r, s in zip((x, y), shift, strict=True)]
        if not prior.soft:
            return float(all(a < side for a, side in zip(away, sides, strict=True)))
        s = math.exp(prior.log_sharpness[head].item())
        return math.prod(
            sigmoid(s * (side - a)) for a, side in zip(away, sides, strict=True)
        )

    if prior.shape == 'square':
        return inside(half)
    p, q = inside(half), inside(half[::-1])
    return p + q - p * q


WINDOWS = [[3, 1], [2, 2], [5, 3]]
SHIFTS = [[0, 0], [0.5, -0.5], [-1, 1]]
KINDS = {
    'linear': (linear, dict(type='LinearSpatialPrior')),
    'table': (table, dict(type='TableSpatialPrior', grid=(3, 4))),
    'table-raw': (table, dict(type='TableSpatialPrior', grid=(3, 4), coords='raw')),
    'square': (
        window,
        dict(type='WindowSpatialPrior', window=WINDOWS, shift=SHIFTS),
    ),
    'cross': (
        window,
        dict(type='WindowSpatialPrior', window=WINDOWS, shift=SHIFTS, shape='cross'),
    ),
    'soft': (
        window,
        dict(type='WindowSpatialPrior', window=WINDOWS, shift=SHIFTS, soft=True),
    ),
    'soft-cross': (
        window,
        dict(type='WindowSpatialPrior', window=(5, 1), shape='cross', soft=True),
    ),
}


def build(kind, noise=0.3, **kwargs):
    formula, cfg = KINDS[kind]
    prior = MODELS.build(dict(cfg, num_heads=HEADS, **kwargs)).double()
    with torch.no_grad():
        for param in prior.parameters():
            param += noise * torch.randn_like(param)
    return formula, prior


@pytest.mark.parametrize('hw', [*GRIDS, (3, 4), (6, 8)])
@pytest.mark.parametrize('kind', KINDS)
def test_every_pair_is_the_formula(kind, hw):
    formula, prior = build(kind)
    omega = prior.expand(hw).detach().numpy()
    n = hw[0] * hw[1]
    expected = np.empty((HEADS, n, n))
    for h, i, j in np.ndindex(HEADS, n, n):
        x, y = j % hw[1] - i % hw[1], j // hw[1] - i // hw[1]
        expected[h, i, j] = formula(prior, h, x, y, hw)
    np.testing.assert_allclose(omega, expected, rtol=1e-6 if 'table' in kind else 1e-10)


@pytest.mark.parametrize('hw', [(2, 3), (1, 1)])
@pytest.mark.parametrize('kind', ['linear', 'table', 'soft', 'soft-cross'])
def test_gradients(kind, hw):
    """The forward is the formula, so its own differences are the formula's."""
    _, prior = build(kind)
    names, params = zip(*prior.named_parameters(), strict=True)

    def values(*given):
        return functional_call(prior, dict(zip(names, given, strict=True)), (hw,))

    assert torch.autograd.gradcheck(values, params)


@pytest.mark.parametrize('kind', ['linear', 'table'])
def test_new_ones_are_neutral_also_after_init_weights(kind):
    class Model(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type='TruncNormal', layer='Linear', std=1.0))
            self.prior = build(kind, noise=0)[1]

    model = Model()
    model.init_weights()
    assert torch.equal(model.prior((2, 3)), torch.ones(HEADS, 3, 5).double())


def test_a_hard_window_covers_its_size():
    table = WindowSpatialPrior(1, window=(3, 5))((7, 7))[0]
    assert table.sum() == 15
    assert table[4:9, 5:8].eq(1).all()  # the zero offset is entry (6, 6)
    even = WindowSpatialPrior(1, window=4, shift=(0.5, 0.5))((7, 7))[0]
    assert even.sum() == 16
    cross = WindowSpatialPrior(1, window=(7, 1), shape='cross')((7, 7))[0]
    assert cross.sum() == 13


def test_the_soft_window_tends_to_the_hard_one():
    for shape in ('square', 'cross'):
        kwargs = dict(window=(5, 3), shift=(1, 0), shape=shape)
        hard = WindowSpatialPrior(2, **kwargs)((5, 6))
        soft = WindowSpatialPrior(2, soft=True, sharpness=60, **kwargs)((5, 6))
        torch.testing.assert_close(soft, hard, rtol=0, atol=1e-6)


def test_a_hard_window_moves_with_its_model_and_is_in_no_checkpoint():
    prior = WindowSpatialPrior(2)
    assert not prior.state_dict()
    assert WindowSpatialPrior(2).to('meta')._anchor().device.type == 'meta'


@pytest.mark.parametrize('combine', ['multiply', 'add'])
@pytest.mark.parametrize('hw', [(5, 6), (20, 17)])
def test_a_masked_window_is_neighbourhood_attention(combine, hw):
    """Each patch sees the patches within its window, and the class token."""
    cfg = dict(type='WindowSpatialPrior', window=(5, 3), masked=True)
    attn = SpatialPriorAttention(8, 2, cfg, combine, num_extra_tokens=1).double()
    x = torch.randn(1, 1 + hw[0] * hw[1], 8, dtype=torch.float64)
    q, k, v = attn.project_qkv(x, hw)
    scores = attn.scale * q @ k.transpose(-2, -1)
    y, x_ = torch.arange(hw[0] * hw[1]) // hw[1], torch.arange(hw[0] * hw[1]) % hw[1]
    near = ((y - y[:, None]).abs() <= 1) & ((x_ - x_[:, None]).abs() <= 2)
    scores[..., 1:, 1:].masked_fill_(~near, -float('inf'))
    expected = attn.merge_heads(scores.softmax(-1) @ v, v)
    torch.testing.assert_close(attn(x, hw), expected)


@pytest.mark.parametrize('coords', ['scaled', 'raw', 'clamped'])
def test_a_checkpoint_of_another_grid_is_resized(coords):
    _, old = build('table', coords=coords)
    new = TableSpatialPrior(HEADS, grid=(5, 7), coords=coords).double()
    state = old.state_dict()
    new.load_state_dict(state)
    # What the old one says on that grid, now its own.
    torch.testing.assert_close(new((5, 7)), old((5, 7)), rtol=1e-6, atol=1e-6)
    assert new.state_dict().get('train_grid', torch.tensor([5, 7])).tolist() == [5, 7]
    assert state['table'].shape == (HEADS, 5, 7), 'the caller keeps his checkpoint'


def test_a_table_of_another_head_count_is_refused():
    with pytest.raises(RuntimeError, match='size mismatch for table'):
        TableSpatialPrior(2, grid=(5, 7)).load_state_dict(
            build('table')[1].state_dict()
        )


def test_resizing_keeps_the_middle_and_the_borders():
    grid = torch.arange(25.0).view(1, 5, 5)
    resized = resize_table(grid, (5, 5))
    assert resized.shape == (1, 9, 9)
    assert resized[0, 4, 4] == grid[0, 2, 2]
    assert resized[0, 0, 0] == pytest.approx(grid[0, 0, 0].item(), abs=0.7 * 6)
    assert resize_table(grid, (3, 3)) is grid


@pytest.mark.parametrize('kind', KINDS)
def test_copies_pickles_and_checkpoints(kind):
    _, prior = build(kind)
    loaded = build(kind)[1]
    loaded.load_state_dict(prior.state_dict())
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), loaded):
        assert torch.equal(other((4, 2)), prior((4, 2)))


@pytest.mark.parametrize('kind', KINDS)
def test_in_float32_under_mixed_precision(kind):
    prior = build(kind)[1].float()
    expected = prior((3, 4))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(prior((3, 4)), expected)
    half = copy.deepcopy(prior).bfloat16()((3, 4))
    assert half.dtype == torch.float32
    if kind not in ('square', 'cross'):
        torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('kind', ['table', 'soft-cross', 'square'])
def test_compiles_into_one_graph(kind):
    _, cfg = KINDS[kind]
    attn = SpatialPriorAttention(12, HEADS, prior=cfg, num_extra_tokens=1).eval()
    x = torch.randn(2, 7, 12)
    expected = attn(x, (2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(attn, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x, (2, 3)), expected)


def test_attention_with_a_window_is_its_formula():
    attn = SpatialPriorAttention(
        12, 3, prior=dict(type='WindowSpatialPrior', window=3), num_extra_tokens=1
    ).double()
    x = torch.randn(2, 7, 12).double()
    q, k, v = attn.qkv(x).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    omega = nn.functional.pad(attn.prior.expand((2, 3)).double(), (1, 0, 1, 0), value=1)
    weights = (q @ k.transpose(-2, -1) / 2 * omega).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).reshape(2, 7, 12))
    torch.testing.assert_close(attn(x, (2, 3)), expected)


@pytest.mark.parametrize(
    ('cls', 'kwargs', 'message'),
    [
        (LinearSpatialPrior, dict(num_heads=0), 'num_heads'),
        (TableSpatialPrior, dict(), 'needs `grid`'),
        (TableSpatialPrior, dict(grid=(0, 3)), 'needs `grid`'),
        (
            WindowSpatialPrior,
            dict(masked=True, soft=True),
            '`masked` takes a hard window',
        ),
        (WindowSpatialPrior, dict(masked=True, shift=(9, 0)), 'holds the query itself'),
        (WindowSpatialPrior, dict(shape='round'), "'square', 'cross'"),
        (WindowSpatialPrior, dict(window=0), '`window` must be positive'),
        (WindowSpatialPrior, dict(window=(1, 2, 3)), '`window` must be a pair'),
        (WindowSpatialPrior, dict(shift='left'), '`shift` must be a pair'),
        (WindowSpatialPrior, dict(shift=[(0, 0)] * 4), 'or 2 of them'),
        (WindowSpatialPrior, dict(soft=True, sharpness=0), '`sharpness`'),
    ],
)
def test_bad_arguments(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(**{'num_heads': 2, **kwargs})
