import numpy as np
import pytest
import torch
import torch.nn as nn
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.registry import MODELS

from spvit_mm.models import MLPSpatialPrior, SpatialPriorAttention

from . import AUTOCAST_DTYPES
from .naive import pair_prior, spsa

CASES = [((3, 3), 0), ((2, 4), 0), ((1, 5), 0), ((3, 2), 1), ((2, 3), 2), ((1, 1), 1)]


def build(**kwargs):
    cfg = dict(
        type='SpatialPriorAttention', embed_dims=12, num_heads=3, prior=dict(
            type='MLPSpatialPrior', hidden_dims=5
        )
    )  # fmt: skip
    cfg.update(kwargs)
    attn = MODELS.build(cfg).double()
    for param in attn.parameters():
        nn.init.normal_(param, std=0.5)
    return attn


@pytest.mark.parametrize(('hw', 'extra'), CASES)
@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('prior_heads', [1, 3])
def test_forward_is_the_formula(hw, extra, qkv_bias, prior_heads):
    prior = dict(type='MLPSpatialPrior', hidden_dims=5, num_heads=prior_heads)
    attn = build(num_extra_tokens=extra, qkv_bias=qkv_bias, prior=prior).eval()
    x = torch.randn(2, extra + hw[0] * hw[1], 12, dtype=torch.float64)
    omegas = [pair_prior(attn.prior, hw, head) for head in range(3)]
    expected = spsa(x.numpy(), attn, hw, omegas)
    np.testing.assert_allclose(attn(x, hw).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(('hw', 'extra'), [((2, 3), 0), ((3, 2), 1), ((1, 4), 0)])
@pytest.mark.parametrize('prior_heads', [1, 3])
def test_gradients_of_every_parameter(hw, extra, prior_heads):
    """Against central differences of the naive formula."""
    prior = dict(type='MLPSpatialPrior', hidden_dims=2, num_heads=prior_heads)
    attn = build(num_extra_tokens=extra, prior=prior)
    x = torch.randn(1, extra + hw[0] * hw[1], 12, dtype=torch.float64)
    weight = torch.randn_like(x)
    (attn(x, hw) * weight).sum().backward()

    def loss():
        omegas = [pair_prior(attn.prior, hw, head) for head in range(3)]
        return float((spsa(x.numpy(), attn, hw, omegas) * weight.numpy()).sum())

    rng = np.random.default_rng(0)
    for name, param in attn.named_parameters():
        flat, grad = param.data.view(-1), param.grad.view(-1)
        for i in rng.choice(len(flat), size=min(3, len(flat)), replace=False):
            eps, value = 1e-6, flat[i].item()
            flat[i] = value + eps
            above = loss()
            flat[i] = value - eps
            below = loss()
            flat[i] = value
            expected = (above - below) / (2 * eps)
            assert grad[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(('hw', 'extra'), [((3, 5), 0), ((4, 4), 1)])
def test_new_attention_is_mmpretrains(hw, extra):
    attn = SpatialPriorAttention(32, 4, num_extra_tokens=extra)
    plain = MultiheadAttention(32, 4)
    missing = attn.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(key.startswith('prior.') for key in missing)
    x = torch.randn(2, extra + hw[0] * hw[1], 32)
    torch.testing.assert_close(attn(x, hw), plain(x), rtol=1e-5, atol=1e-6)


def test_qk_scale_multiplies():
    attn = build(qk_scale=0.25)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    q, k, v = attn.qkv(x).view(1, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * 0.25 * attn.prior.expand((2, 3))).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).reshape(1, 6, 12))
    torch.testing.assert_close(attn(x, (2, 3)), expected)


def test_given_table_is_used():
    prior = MLPSpatialPrior(3).double()
    for param in prior.parameters():
        nn.init.normal_(param)
    attn = build(prior=None)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    omegas = [pair_prior(prior, (2, 3), head) for head in range(3)]
    expected = spsa(x.numpy(), attn, (2, 3), omegas)
    got = attn(x, (2, 3), prior((2, 3))).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_without_any_prior_it_is_vanilla():
    attn = SpatialPriorAttention(32, 4, prior=None)
    plain = MultiheadAttention(32, 4)
    attn.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(attn(x, (2, 3)), plain(x))


def test_attention_dropout_only_in_training():
    attn = build(attn_drop=0.5)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    attn.eval()
    assert torch.equal(attn(x, (2, 3)), attn(x, (2, 3)))
    attn.train()
    assert not torch.equal(attn(x, (2, 3)), attn(x, (2, 3)))


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_mixed_precision_stays_close(dtype):
    attn = build().float()
    x = torch.randn(2, 12, 12)
    expected = attn(x, (3, 4))
    with torch.autocast('cpu', dtype=dtype):
        out = attn(x, (3, 4))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_bad_arguments():
    with pytest.raises(ValueError, match='embed_dims=10 and num_heads=3'):
        SpatialPriorAttention(10, 3)
    with pytest.raises(ValueError, match='takes a prior of 1 or 4'):
        SpatialPriorAttention(
            32, 4, prior=dict(type='MLPSpatialPrior', num_heads=2)
        )  # fmt: skip
    with pytest.raises(ValueError, match=r'must be a config dict with a `type`'):
        SpatialPriorAttention(32, 4, prior='MLPSpatialPrior')
    with pytest.raises(ValueError, match="'NoSuchPrior', which is not registered"):
        SpatialPriorAttention(32, 4, prior=dict(type='NoSuchPrior'))
    with pytest.raises(ValueError, match=r'7 tokens, but `hw_shape` 2 x 3'):
        SpatialPriorAttention(32, 4)(torch.rand(1, 7, 32), (2, 3))


@pytest.mark.parametrize('qk_scale', [None, 0.1])
def test_init_score_is_the_score_of_every_pair(qk_scale):
    attn = SpatialPriorAttention(16, 4, init_score=1.5, qk_scale=qk_scale)
    q, k, _ = attn.project_qkv(torch.zeros(1, 6, 16), (2, 3))
    torch.testing.assert_close(
        attn.scale * q @ k.transpose(-2, -1), torch.full((1, 4, 6, 6), 1.5)
    )


def test_init_score_survives_the_initialisation_of_a_model():
    model = MODELS.build(
        dict(
            type='SPViT',
            arch=dict(
                embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32
            ),
            img_size=16,
            patch_size=4,
            num_spsa_layers=2,
            attn_cfg=dict(init_score=1.0),
            init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        )
    )
    model.init_weights()
    biases = [layer.attn.qkv.bias[:32].detach() for layer in model.layers]
    for bias in biases[:2]:
        torch.testing.assert_close(bias, torch.full((32,), 8**-0.25))
    assert not biases[2].any()


@pytest.mark.parametrize('kwargs', [dict(init_score=-1), dict(combine='add')])
def test_init_score_is_for_a_product(kwargs):
    with pytest.raises(ValueError, match='`init_score` must be at least 0'):
        SpatialPriorAttention(16, 4, **{'init_score': 1.0, **kwargs})


def test_init_score_without_biases_is_a_scalar_for_each_head():
    attn = SpatialPriorAttention(16, 4, init_score=1.5, qkv_bias=False)
    assert attn.score.tolist() == [1.5] * 4
    assert not any(
        'score' in name for name in SpatialPriorAttention(16, 4).state_dict()
    )


@pytest.mark.parametrize('extra', [0, 1])
def test_init_score_means_the_same_with_biases_and_without(extra):
    """Also for class tokens, whose pairs have the score, but no prior."""
    cfg = dict(prior=dict(type='MLPSpatialPrior', init='local'), init_score=1.5)
    with_bias = SpatialPriorAttention(16, 4, num_extra_tokens=extra, **cfg)
    without = SpatialPriorAttention(
        16, 4, num_extra_tokens=extra, qkv_bias=False, **cfg
    )
    for attn in (with_bias, without):
        torch.nn.init.zeros_(attn.qkv.weight[:32])
    without.load_state_dict(with_bias.state_dict(), strict=False)
    with_bias.qkv.bias.data[32:] = 0
    x = torch.randn(2, extra + 6, 16)
    torch.testing.assert_close(with_bias(x, (2, 3)), without(x, (2, 3)))
