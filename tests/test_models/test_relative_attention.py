import copy
import math
import pickle

import numpy as np
import pytest
import torch
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.registry import MODELS
from torch.func import functional_call

from spvit_mm.models import GatedPositionalAttention, RelativePositionAttention, SPViT

from . import AUTOCAST_DTYPES

CASES = [((3, 3), 0), ((2, 4), 1), ((1, 5), 0), ((3, 2), 2), ((1, 1), 1)]
GATED = dict(type='GatedPositionalAttention')
BIAS = dict(type='RelativePositionAttention', mode='bias')
EMBEDDING = dict(type='RelativePositionAttention', mode='embedding')
KINDS = {'gated': GATED, 'bias': BIAS, 'embedding': EMBEDDING}


def build(kind, hw, extra, **kwargs):
    cfg = dict(embed_dims=12, num_heads=4, grid=hw, num_extra_tokens=extra, **kwargs)
    attn = MODELS.build({**KINDS[kind], **cfg}).double()
    for param in attn.parameters():
        torch.nn.init.normal_(param, std=0.5)
    return attn


def softmax(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def naive(attn, kind, x, hw):
    """The formulas pair by pair."""
    batch, length, dims = x.shape
    heads, extra = attn.num_heads, length - hw[0] * hw[1]
    d = dims // heads
    params = {n: p.detach().numpy() for n, p in attn.named_parameters()}
    out = np.zeros((batch, length, dims))
    for b, h in np.ndindex(batch, heads):
        qkv = x[b] @ params['qkv.weight'].T + params.get('qkv.bias', 0)
        part = slice(h * d, (h + 1) * d)
        q, k, v = (qkv[:, i * dims : (i + 1) * dims][:, part] for i in range(3))
        for i in range(length):
            scores = np.array([q[i] @ k[j] / math.sqrt(d) for j in range(length)])
            position = np.full(length, -np.inf)
            for j in range(length):
                if i < extra or j < extra:
                    continue
                p, r = i - extra, j - extra
                dx, dy = r % hw[1] - p % hw[1], r // hw[1] - p // hw[1]
                if kind == 'gated':
                    vector = np.array([dx * dx + dy * dy, dx, dy])
                    position[j] = params['position'][h] @ vector
                    continue
                entry = params['table'][h][..., dy + hw[0] - 1, dx + hw[1] - 1]
                if kind == 'bias':
                    scores[j] += entry
                else:
                    scores[j] += q[i] @ entry / math.sqrt(d)
            a = softmax(scores)
            if kind == 'gated' and i >= extra:
                s = 1 / (1 + np.exp(-params['gate'][h]))
                a[extra:] = (1 - s) * a[extra:] + s * softmax(position[extra:])
                a = a / a.sum()
            out[b, i, part] = a @ v
    return out @ params['proj.weight'].T + params['proj.bias']


@pytest.mark.parametrize(('hw', 'extra'), CASES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_forward_is_the_formula(kind, hw, extra, qkv_bias):
    attn = build(kind, hw, extra, qkv_bias=qkv_bias)
    x = torch.randn(2, extra + hw[0] * hw[1], 12).double()
    got = attn(x, hw).detach().numpy()
    np.testing.assert_allclose(got, naive(attn, kind, x.numpy(), hw), rtol=1e-9)


@pytest.mark.parametrize(('hw', 'extra'), [((2, 3), 0), ((2, 2), 1)])
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_of_every_parameter(kind, hw, extra):
    """The forward is the formula, so its own differences are the formula's."""
    attn = build(kind, hw, extra)
    x = torch.randn(1, extra + hw[0] * hw[1], 12).double().requires_grad_()
    names, params = zip(*attn.named_parameters(), strict=True)

    def outputs(x, *given):
        return functional_call(attn, dict(zip(names, given, strict=True)), (x, hw))

    assert torch.autograd.gradcheck(outputs, (x, *params), fast_mode=True)


def test_new_bias_is_vanilla_attention():
    attn = RelativePositionAttention(32, 4, grid=(2, 3))
    plain = MultiheadAttention(32, 4)
    attn.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(attn(x, (2, 3)), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['bias', 'embedding'])
def test_tables_are_resized_for_other_grids(kind):
    old = build(kind, (3, 4), 1)
    new = build(kind, (5, 7), 1)
    new.load_state_dict(old.state_dict())
    assert new.table.shape[-2:] == (9, 13)
    x = torch.randn(2, 36, 12).double()
    torch.testing.assert_close(new(x, (5, 7)), old(x, (5, 7)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_any_grid_at_run_time(kind):
    attn = build(kind, (3, 3), 1).eval()
    for hw in [(1, 1), (1, 7), (6, 2)]:
        x = torch.randn(1, 1 + hw[0] * hw[1], 12).double()
        assert attn(x, hw).shape == x.shape


def test_local_start():
    """Each head looks at its own neighbour, and gives its value back."""
    attn = GatedPositionalAttention(18, 9, locality_strength=20.0)
    table = attn.position_scores((5, 5))
    for head, (x, y) in enumerate((x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)):
        assert table[head].argmax() == (y + 4) * 9 + x + 4
    # with the gate wide open, the middle patch gathers its nine neighbours
    torch.nn.init.constant_(attn.gate, 30.0)
    torch.nn.init.eye_(attn.proj.weight)
    torch.nn.init.zeros_(attn.proj.bias)
    x = torch.randn(1, 9, 18)
    out = attn(x, (3, 3))[0, 4]
    for head in range(9):
        part = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[part], x[0, head, part], rtol=0, atol=1e-3)


def test_start_of_v_and_lambda():
    attn = GatedPositionalAttention(16, 4, locality_strength=0.5)
    assert attn.gate.tolist() == [1, 1, 1, 1]
    assert attn.position.tolist() == [
        [-0.5, -0.5, -0.5],
        [-0.5, 0.5, -0.5],
        [-0.5, -0.5, 0.5],
        [-0.5, 0.5, 0.5],
    ]


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_local_start_survives_init_weights(qkv_bias):
    model = SPViT(
        arch=dict(embed_dims=36, num_layers=2, num_heads=9, feedforward_channels=8),
        img_size=8,
        patch_size=4,
        attn_cfg=dict(type='GatedPositionalAttention', locality_strength=2.0),
        num_spsa_layers=1,
        qkv_bias=qkv_bias,
        init_cfg=[dict(type='TruncNormal', layer='Linear', std=0.5, bias=0.1)],
    )
    model.init_weights()
    attn = model.layers[0].attn
    assert torch.equal(attn.qkv.weight[72:], torch.eye(36))
    assert not torch.equal(attn.qkv.weight[36:72], torch.eye(36))
    assert attn.qkv.weight[:72].std() > 0.3
    if qkv_bias:
        assert attn.qkv.bias[72:].eq(0).all()
    assert attn.position[:, 0].eq(-2).all()


def test_random_start_takes_any_head_count():
    attn = GatedPositionalAttention(12, 3, init='random')
    assert 0 < attn.position.abs().max() < 0.1
    assert attn(torch.randn(1, 4, 12), (2, 2)).shape == (1, 4, 12)


def backbone(kind, **kwargs):
    return SPViT(
        arch=dict(embed_dims=12, num_layers=3, num_heads=4, feedforward_channels=8),
        img_size=(12, 16),
        patch_size=4,
        attn_cfg=KINDS[kind],
        **kwargs,
    )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('cls_token_layer', [0, None])
def test_in_a_backbone(kind, cls_token_layer):
    model = backbone(kind, cls_token_layer=cls_token_layer, drop_path_rate=0.1)
    model.init_weights()
    model(torch.randn(2, 3, 12, 16))[0].sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused
    model.eval()
    assert model(torch.randn(1, 3, 20, 8))[0].shape == (1, 12)
    state = copy.deepcopy(model).state_dict()
    other = backbone(kind, cls_token_layer=cls_token_layer)
    other.load_state_dict(state)
    x = torch.randn(1, 3, 12, 16)
    expected = model(x)[0]
    for clone in (other.eval(), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone(x)[0], expected)


@pytest.mark.parametrize('kind', ['bias', 'embedding'])
def test_backbone_loads_the_checkpoint_of_another_image_size(kind):
    small = backbone(kind).eval()
    for layer in small.layers[:1]:
        torch.nn.init.normal_(layer.attn.table)
    large = SPViT(
        arch=small.arch_settings, img_size=32, patch_size=4, attn_cfg=KINDS[kind]
    )
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(large.eval()(x)[0], small(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_compiles_into_one_graph(kind):
    attn = build(kind, (2, 3), 1).float().eval()
    x = torch.randn(2, 7, 12)
    expected = attn(x, (2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(attn, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x, (2, 3)), expected)


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@pytest.mark.parametrize('kind', KINDS)
def test_mixed_precision_stays_close(kind, dtype):
    attn = build(kind, (3, 4), 1).float()
    x = torch.randn(2, 13, 12)
    expected = attn(x, (3, 4))
    with torch.autocast('cpu', dtype=dtype):
        out = attn(x, (3, 4))
    out.float().sum().backward()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('kind', KINDS)
def test_dropout_only_in_training(kind):
    attn = build(kind, (2, 3), 0, attn_drop=0.5)
    x = torch.randn(1, 6, 12).double()
    assert not torch.equal(attn(x, (2, 3)), attn(x, (2, 3)))
    attn.eval()
    assert torch.equal(attn(x, (2, 3)), attn(x, (2, 3)))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r'square number .* got 6'):
        GatedPositionalAttention(12, 6)
    with pytest.raises(ValueError, match="'local', 'random'"):
        GatedPositionalAttention(12, 4, init='global')
    with pytest.raises(ValueError, match='needs `grid`'):
        RelativePositionAttention(12, 4)
    with pytest.raises(ValueError, match="'bias', 'embedding'"):
        RelativePositionAttention(12, 4, mode='shaw', grid=(2, 2))
    with pytest.raises(ValueError, match="'raw', 'scaled', 'clamped'"):
        RelativePositionAttention(12, 4, grid=(2, 2), coords='polar')
    with pytest.raises(ValueError, match='embed_dims=10 and num_heads=4'):
        RelativePositionAttention(10, 4, grid=(2, 2))
    attn = RelativePositionAttention(12, 4, grid=(2, 2))
    with pytest.raises(ValueError, match=r'5 tokens, but `hw_shape` 2 x 2'):
        attn(torch.rand(1, 5, 12), (2, 2))
    with pytest.raises(ValueError, match='RelativePositionAttention takes none'):
        attn(torch.rand(1, 4, 12), (2, 2), torch.ones(4, 3, 3))
