import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmpretrain.registry import MODELS

from spvit_mm.models import MLPSpatialPrior, SpatialPrior, relative_offsets

from . import AUTOCAST_DTYPES
from .naive import pair_prior

GRIDS = [(1, 1), (1, 5), (4, 1), (3, 3), (2, 5), (4, 3)]


def random_prior(heads=3, **kwargs):
    prior = MLPSpatialPrior(heads, **kwargs).double()
    for param in prior.parameters():
        nn.init.normal_(param)
    return prior


@pytest.mark.parametrize('hw', GRIDS)
def test_expanded_prior_is_the_formula_on_every_pair(hw):
    prior = random_prior(hidden_dims=7)
    omega = prior.expand(hw).detach().numpy()
    assert omega.shape == (3, hw[0] * hw[1], hw[0] * hw[1])
    for head in range(3):
        np.testing.assert_allclose(omega[head], pair_prior(prior, hw, head), rtol=1e-10)


@pytest.mark.parametrize('hw', GRIDS)
def test_new_prior_is_one_everywhere(hw):
    for kwargs in ({}, {'init': 'spread', 'grid': (4, 4)}, {'hidden_dims': (8, 4)}):
        table = MLPSpatialPrior(2, **kwargs)(hw)
        assert table.shape == (2, 2 * hw[0] - 1, 2 * hw[1] - 1)
        assert torch.equal(table, torch.ones_like(table))


@pytest.mark.parametrize(('heads', 'hidden_dims'), [(1, 32), (4, 33), (6, 16)])
def test_local_start_is_a_cone_beside_the_query(heads, hidden_dims):
    prior = MLPSpatialPrior(heads, hidden_dims, init='local', locality=0.5)
    table = prior((4, 6)).detach().numpy()
    for h in range(heads):
        angle = 2 * np.pi * h / heads
        centre = (np.cos(angle), np.sin(angle)) if heads > 1 else (0, 0)
        for dy in range(-3, 4):
            for dx in range(-5, 6):
                distance = np.hypot(dx - centre[0], dy - centre[1])
                # A polygon in place of the circle: 16 units make 16 corners.
                assert table[h, dy + 3, dx + 5] == pytest.approx(
                    1 - 0.5 * distance, abs=0.5 * distance * 0.03 + 1e-5
                )


def test_released_start():
    prior = MLPSpatialPrior(6, hidden_dims=64)
    shapes = {name: tuple(p.shape) for name, p in prior.named_parameters()}
    assert shapes == {'w1': (384, 2), 'b1': (384,), 'w2': (384, 1), 'b2': (6,)}
    assert 0.01 < prior.w1.std() < 0.03
    assert prior.b1.eq(0).all()
    assert prior.w2.eq(0).all()
    assert prior.b2.eq(1).all()


def test_init_weights_of_a_whole_model_leaves_it_neutral():
    from mmengine.model import BaseModule

    class Model(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type='TruncNormal', layer='Linear', std=1.0))
            self.linear = nn.Linear(2, 2)
            self.prior = MLPSpatialPrior(2)

    model = Model()
    model.init_weights()
    assert torch.equal(model.prior((3, 2)), torch.ones(2, 5, 3))


def test_deep_mlp_is_the_composition():
    prior = random_prior(2, hidden_dims=(5, 4), act_cfg=dict(type='GELU'))
    offsets = relative_offsets((3, 2)).double().reshape(-1, 2)
    table = prior((3, 2))
    for h in range(2):
        x = offsets
        for i, (fan_out, fan_in) in enumerate([(5, 2), (4, 5)], 1):
            weight = getattr(prior, f'w{i}').view(2, fan_out, fan_in)[h]
            x = nn.functional.gelu(
                x @ weight.t() + getattr(prior, f'b{i}').view(2, -1)[h]
            )
        x = x @ prior.w3.view(2, 4)[h] + prior.b3[h]
        torch.testing.assert_close(table[h].flatten(), x)


def test_offsets():
    offsets = relative_offsets((2, 3))
    assert offsets.shape == (3, 5, 2)
    # right and down are positive; the middle is the query itself
    assert offsets[1, 2].tolist() == [0, 0]
    assert offsets[0, 0].tolist() == [-2, -1]
    assert offsets[2, 3].tolist() == [1, 1]
    with pytest.raises(ValueError, match='at least 1 x 1'):
        relative_offsets((0, 3))


def test_offsets_made_in_inference_mode_can_be_trained_with():
    hw = (5, 9)
    with torch.inference_mode():
        MLPSpatialPrior(1)(hw)
    prior = MLPSpatialPrior(1)
    prior(hw).sum().backward()
    assert prior.w2.grad is not None


def test_scaled_coords_keep_the_borders_and_clamped_ones_their_range():
    train, test = (3, 4), (6, 12)
    raw = random_prior(1)
    for coords in ('scaled', 'clamped'):
        prior = MLPSpatialPrior(1, coords=coords, grid=train).double()
        prior.load_state_dict(raw.state_dict(), strict=False)
        torch.testing.assert_close(prior(train), raw(train))
        table, offsets = prior(test), relative_offsets(test).double()
        if coords == 'scaled':
            seen = offsets * torch.tensor([4 / 12, 3 / 6])
        else:
            limit = torch.tensor([3.0, 2.0], dtype=torch.float64)
            seen = torch.maximum(torch.minimum(offsets, limit), -limit)
        expected = raw.relation(seen.reshape(-1, 2)).reshape(table.shape)
        torch.testing.assert_close(table, expected)


def test_the_training_grid_is_remembered():
    prior = MLPSpatialPrior(1, coords='clamped', grid=(3, 4))
    other = MLPSpatialPrior(1, coords='clamped', grid=(9, 9))
    other.load_state_dict(prior.state_dict())
    assert other.train_grid.tolist() == [3, 4]


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_computed_in_float32_under_mixed_precision(dtype):
    prior = random_prior(2).float()
    expected = prior((4, 4))
    with torch.autocast('cpu', dtype=dtype):
        table = prior((4, 4))
    assert table.dtype == torch.float32
    assert torch.equal(table, expected)
    assert copy.deepcopy(prior).to(dtype)((4, 4)).dtype == torch.float32


def test_copies_and_pickles():
    prior = random_prior(2, coords='scaled', grid=(3, 3))
    for clone in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(clone((4, 2)), prior((4, 2)))


def test_a_relation_that_writes_to_its_offsets_harms_no_other():
    class Distance(SpatialPrior):
        def relation(self, offsets):
            return offsets.abs_().sum(-1).expand(self.num_heads, -1)

    clean = random_prior()
    before = clean((3, 4))
    Distance(2)((3, 4))
    assert torch.equal(clean((3, 4)), before)
    assert relative_offsets((3, 4)).min() == -3


def test_own_relation_in_a_few_lines():
    class Distance(SpatialPrior):
        def __init__(self, num_heads, **kwargs):
            super().__init__(num_heads, **kwargs)
            self.slope = nn.Parameter(torch.zeros(num_heads, 1))

        def relation(self, offsets):
            return 1 + self.slope * offsets.norm(dim=-1)

    prior = Distance(2)
    nn.init.ones_(prior.slope)
    assert prior.expand((1, 3))[0].tolist() == [[1, 2, 3], [2, 1, 2], [3, 2, 1]]


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_heads=0), 'num_heads'),
        (dict(num_heads=2, hidden_dims=0), 'hidden_dims'),
        (dict(num_heads=2, hidden_dims=()), 'hidden_dims'),
        (dict(num_heads=2, coords='polar'), "'raw', 'scaled', 'clamped'"),
        (dict(num_heads=2, coords='scaled'), 'needs `grid`'),
        (dict(num_heads=2, init='random'), "'released', 'spread'"),
        (dict(num_heads=2, init='spread'), 'needs `grid`'),
        (dict(num_heads=2, init='local', hidden_dims=3), 'at least 4 units'),
        (dict(num_heads=2, init='local', hidden_dims=(32, 32)), 'one hidden layer'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='MLPSpatialPrior', **kwargs))
