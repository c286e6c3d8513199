"""What holds for every method of docs/positions.md."""

import copy
import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch import nn

from spvit_mm.apis import export
from spvit_mm.models import SpatialPrior, SPViT
from spvit_mm.models.attention import evaluate_priors
from spvit_mm.models.position import draw_rescale

from . import AUTOCAST_DTYPES, loss_of
from .naive_positions import ANGLES, attend, is_visible, rotated
from .test_spvit import WHOLE_GRAPH

ROOT = Path(__file__).parents[2]
WIDTH = 8  # of a head


class Method(NamedTuple):
    """``attn`` and ``prior`` as SPViT takes them; ``heads`` are tried in turn."""

    attn: dict
    prior: Optional[dict] = None
    heads: tuple = (2, 3, 1)
    qkv_bias: bool = True


PRIORS = {
    'mlp': dict(type='MLPSpatialPrior', hidden_dims=5),
    'log': dict(type='MLPSpatialPrior', hidden_dims=5, coords='log'),
    'linear': dict(type='LinearSpatialPrior'),
    'table': dict(type='TableSpatialPrior'),
    'window': dict(type='WindowSpatialPrior', window=3, soft=True),
}
ADD = dict(combine='add')
LOOKHERE = dict(type='LookHereSpatialPrior')
VIEWS = dict(LOOKHERE, views=('up', 'left-down', 'all', 'right'), field_of_view=120)
ROTARY = dict(type='RotaryPositionAttention')
RELATIVE = dict(type='RelativePositionAttention')
GATED = dict(type='GatedPositionalAttention')
METHODS = {
    **{
        f'{combine}-{name}': Method(
            dict(combine=combine, strength=1.0 if combine == 'multiply' else 0.7), prior
        )
        for combine in ('multiply', 'add', 'both')
        for name, prior in PRIORS.items()
    },
    'score': Method(dict(init_score=1.5), PRIORS['mlp']),
    'score-no-bias': Method(dict(init_score=1.5), PRIORS['mlp'], qkv_bias=False),
    'score-both': Method(
        dict(combine='both', init_score=1.5), PRIORS['linear'], qkv_bias=False
    ),
    'scaled': Method({}, dict(PRIORS['mlp'], coords='scaled')),
    'clamped': Method(ADD, dict(PRIORS['mlp'], coords='clamped')),
    'hard-window': Method({}, dict(type='WindowSpatialPrior', window=3)),
    'log-cpb': Method(ADD, dict(type='LogCPBSpatialPrior', hidden_dims=6)),
    'alibi': Method(ADD, dict(type='ALiBiSpatialPrior')),
    'kerple': Method(ADD, dict(type='KERPLESpatialPrior')),
    'lookhere-180': Method(ADD, dict(LOOKHERE, field_of_view=180), (12,)),
    'lookhere-90': Method(ADD, LOOKHERE, (12, 24)),
    'lookhere-45': Method(ADD, dict(LOOKHERE, field_of_view=45), (12,)),
    'lookhere-views': Method(ADD, VIEWS, (4,)),
    'lookhere-multiply': Method({}, dict(VIEWS, type='LookHereProduct'), (4,)),
    'rotary-axial': Method(dict(ROTARY, mode='axial')),
    'rotary-mixed': Method(dict(ROTARY, mode='mixed')),
    'rotary-normalized': Method(dict(ROTARY, mode='normalized')),
    'bias': Method(dict(RELATIVE, mode='bias')),
    'embedding': Method(dict(RELATIVE, mode='embedding')),
    'gated': Method(GATED, heads=(4, 9, 1)),
    'gated-random': Method(dict(GATED, init='random')),
}
WITH_PRIOR = [name for name, method in METHODS.items() if method.prior]
every_method = pytest.mark.parametrize('name', METHODS)


def randomize(module, std=0.5):
    """Leave nothing neutral."""
    for param in module.parameters():
        nn.init.normal_(param, std=std)
    return module


def build_attention(name, grid, extra, heads, **kwargs):
    method = METHODS[name]
    cfg = dict(method.attn, embed_dims=WIDTH * heads, num_heads=heads, **kwargs)
    cfg.setdefault('type', 'SpatialPriorAttention')
    if method.prior:
        cfg['prior'] = method.prior
    attn = MODELS.build(
        dict(cfg, grid=grid, num_extra_tokens=extra, qkv_bias=method.qkv_bias)
    )
    attn.set_depth(1, 5)
    return randomize(attn)


def config(name, num_layers=3, **kwargs):
    """An SPViT of a 2 x 3 grid whose first two layers have the method."""
    method = METHODS[name]
    heads = method.heads[0]
    arch = dict(
        embed_dims=WIDTH * heads,
        num_layers=num_layers,
        num_heads=heads,
        feedforward_channels=16,
    )
    cfg = dict(
        type='mmpretrain.SPViT',
        arch=arch,
        img_size=(16, 24),
        patch_size=8,
        num_spsa_layers=2,
        cls_token_layer=1,  # so that there is a layer with it, and one without
        attn_cfg=method.attn,
        prior=method.prior,
        qkv_bias=method.qkv_bias,
    )
    return {**cfg, **kwargs}


def build(name, **kwargs):
    return MODELS.build(config(name, **kwargs))


IMAGES = (2, 3, 24, 40)  # a grid of 3 x 5, not that of the training


# ------------------------------------------------------------------------- formula

# trained on, run on, extra tokens, factors of the coordinates
CASES = [
    ((3, 3), (3, 3), 0, None),
    ((3, 5), (3, 5), 1, None),
    ((1, 4), (1, 4), 2, None),
    ((2, 3), (3, 5), 0, None),
    ((4, 3), (2, 3), 1, (1.7, 0.6)),
]


@pytest.mark.parametrize('case', range(len(CASES)))
@every_method
def test_outputs_and_gradients_are_the_formulas(name, case):
    grid, hw, extra, factors = CASES[case]
    heads = METHODS[name].heads
    attn = build_attention(name, grid, extra, heads[case % len(heads)]).double()
    x = torch.randn(2, extra + hw[0] * hw[1], attn.embed_dims, dtype=torch.float64)
    direction = torch.randn_like(x)

    params = {n: p.detach().requires_grad_() for n, p in attn.named_parameters()}
    expected = attend(attn, params, x, hw, factors or (1, 1))
    (expected * direction).sum().backward()

    rescale = None if factors is None else torch.tensor(factors, dtype=torch.float64)
    # The constants of fixed methods are float32.
    close = dict(rtol=1e-6, atol=1e-6) if 'ook' in name or name == 'alibi' else {}
    kernels = ('auto', 'eager', 'chunked') if METHODS[name].prior else (None,)
    for kernel in kernels:
        attn.attn_impl = kernel
        attn.zero_grad()
        out = attn(x, hw, rescale=rescale)
        torch.testing.assert_close(out, expected, **close)
        (out * direction).sum().backward()
        for n, param in attn.named_parameters():
            torch.testing.assert_close(param.grad, params[n].grad, msg=n, **close)


def test_rows_are_not_columns():
    """What each method makes of the grid 3 x 5 is not what it makes of 5 x 3."""
    for name in METHODS:
        attn = build_attention(name, (3, 5), 0, METHODS[name].heads[0])
        x = torch.randn(1, 15, attn.embed_dims)
        assert (attn(x, (3, 5)) - attn(x, (5, 3))).abs().max() > 1e-3, name


@pytest.mark.parametrize('field_of_view', [180, 90, 60, 45])
def test_the_border_of_a_view_belongs_to_it_and_nothing_behind(field_of_view):
    """Also far from the query, where the next offsets are close to the border."""
    views = list(ANGLES)
    prior = MODELS.build(
        dict(LOOKHERE, num_heads=8, views=views, field_of_view=field_of_view)
    )
    keep = prior.keep((31, 71))
    for h, y, x in np.ndindex(keep.shape):
        assert keep[h, y, x] == is_visible(prior, h, x - 70, y - 30), (views[h], x, y)


def test_slopes_of_lookhere_fall_over_the_depth():
    model = build('lookhere-180', num_layers=5, num_spsa_layers=5)
    slopes = [layer.attn.prior.layer_slope for layer in model.layers]
    assert slopes == pytest.approx([1.5, 1.25, 1, 0.75, 0.5])
    model = build('lookhere-180', share_prior='network')
    assert model.prior.layer_slope == 1


def test_the_start_of_learned_frequencies():
    """One random direction for each head, and the one across."""
    attn = MODELS.build(dict(ROTARY, embed_dims=48, num_heads=3))
    fx, fy = attn.freqs.detach().view(2, 3, 8)
    size = torch.tensor([10 ** (-4 * t / 16) for t in range(4)])
    torch.testing.assert_close(
        torch.hypot(fx, fy), torch.cat((size, size)).expand(3, 8)
    )
    angle = torch.atan2(fy, fx)
    across = (angle[:, 4:] - angle[:, :4]) % (2 * math.pi)
    torch.testing.assert_close(across, torch.full((3, 4), math.pi / 2))
    torch.testing.assert_close(angle[:, :4], angle[:, :1].expand(3, 4))
    assert len(set(angle[:, 0].tolist())) == 3
    assert attn.freqs.dtype == torch.float32


NEUTRAL = [
    *(f'{combine}-{p}' for combine in ('multiply', 'add', 'both') for p in PRIORS),
    *('scaled', 'clamped', 'bias', 'score', 'score-no-bias', 'score-both'),
]
NEUTRAL = [name for name in NEUTRAL if not name.endswith('window')]


@every_method
def test_what_starts_neutral_and_what_does_not(name):
    """A pre-trained ViT is a valid start for the neutral ones, as the page says."""
    model = build(name, cls_token_layer=0)
    plain = build(name, cls_token_layer=0, num_spsa_layers=0, attn_cfg=None, prior=None)
    for biases in (model, plain):
        nn.init.normal_(biases.cls_token)
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 16, 24)
    same = torch.allclose(model(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    assert same == (name in NEUTRAL)


# --------------------------------------------------------------------- in a backbone


@every_method
def test_every_trained_parameter_gets_a_gradient(name):
    """So that DDP needs no find_unused_parameters."""
    model = randomize(build(name, coords_rescale=2.0))
    loss_of(model(torch.randn(IMAGES))[0]).backward()
    for n, param in model.named_parameters():
        assert param.requires_grad, n
        assert param.grad.isfinite().all(), n
        assert param.grad.any(), n


@every_method
def test_copies_pickles_and_checkpoints(name):
    model = randomize(build(name)).eval()
    loaded = build(name).eval()
    loaded.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x)[0], model(x)[0])


@every_method
@torch.no_grad()
def test_deploy_form(name):
    model = randomize(build(name)).eval()
    x = torch.randn(IMAGES)
    expected = model(x)[0]
    model.switch_to_deploy((3, 5))
    assert torch.equal(model(x)[0], expected)
    loaded = build(name, deploy=True).eval()
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loaded(x)[0], expected)


@every_method
def test_in_mmsegs_scope(name):
    pytest.importorskip('mmseg.models')  # with mmcv-lite it cannot be imported
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build(name, out_type='featmap')
        model.init_weights()
    assert model(torch.randn(IMAGES))[0].shape[2:] == (3, 5)


def learned(model):
    priors = [m for m in model.modules() if isinstance(m, SpatialPrior)]
    return {id(param) for prior in priors for param in prior.parameters()}


@every_method
def test_freeze_all_but_priors(name):
    if not learned(build(name)):
        with pytest.raises(ValueError, match='`freeze_all_but_priors` would freeze'):
            build(name, freeze_all_but_priors=True)
        return
    model = randomize(build(name, freeze_all_but_priors=True, coords_rescale=2.0))
    loss_of(model(torch.randn(IMAGES))[0]).backward()
    priors = learned(model)
    for n, param in model.named_parameters():
        assert (param.grad is not None) == (id(param) in priors), n


# No number of heads that LookHere could split is left.
SHARED = [name for name in WITH_PRIOR if 'lookhere' not in name]


@pytest.mark.parametrize('name', SHARED)
def test_shared_by_the_heads_of_a_layer(name):
    model = randomize(build(name, share_prior='heads'))
    attn = model.layers[0].attn
    tables = evaluate_priors(attn.prior, attn.bias_prior, (3, 5))
    assert tables[0].shape == (1, 5, 9)
    heads = attn.num_heads
    given = [t if t is None else t.expand(heads, -1, -1) for t in tables]
    x = torch.randn(2, 15, attn.embed_dims)
    torch.testing.assert_close(attn(x, (3, 5)), attn(x, (3, 5), given))
    loss_of(model(torch.randn(IMAGES))[0]).backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize('name', WITH_PRIOR)
def test_shared_by_the_whole_network(name):
    """The same as equal priors in every layer, rescaled or not."""
    model = randomize(build(name, share_prior='network', coords_rescale=2.0))
    own = build(name, coords_rescale=2.0)
    state = model.state_dict()
    for n in [n for n in state if n.startswith(('prior.', 'bias_prior.'))]:
        value = state.pop(n)
        state.update({f'layers.{i}.attn.{n}': value for i in (0, 1)})
    own.load_state_dict(state, strict=True)
    for module in own.modules():
        if hasattr(module, 'layer_slope'):
            module.layer_slope = 1.0
    x = torch.randn(IMAGES)
    for mode in (True, False):
        outs = [run(net.train(mode), (x,), 1)[0] for net in (model, own)]
        torch.testing.assert_close(*outs)
    loss_of(outs[0]).backward()
    assert all(param.grad is not None for param in model.parameters())


# ------------------------------------------------------------------- mixed precision


def relative_error(ours, theirs):
    ours, theirs = (torch.cat([x.flatten() for x in xs]) for xs in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@every_method
def test_mixed_precision_stays_close(name, dtype):
    model = randomize(build(name), std=0.2)
    x = torch.randn(IMAGES)
    # What the method itself learns, and the rest.
    method, rest = {}, {}
    for n, param in model.named_parameters():
        own = re.fullmatch(r'layers\.\d\.attn\.(?!qkv|proj).*', n)
        (method if own else rest)[n] = param
    outs, grads = [], []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast('cpu', dtype=dtype, enabled=enabled):
            outs.append(model(x)[0])
        loss_of(outs[-1]).backward()
        grads.append([[p.grad for p in part.values()] for part in (method, rest)])
    eps = torch.finfo(dtype).eps
    assert relative_error(*([out] for out in outs)) < 4 * eps
    for ours, theirs in zip(*grads, strict=True):
        if theirs:
            assert relative_error(ours, theirs) < 40 * eps


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@pytest.mark.parametrize('name', WITH_PRIOR)
def test_tables_in_float32_under_mixed_precision(name, dtype):
    attn = build_attention(name, (3, 4), 0, METHODS[name].heads[0])
    expected = attn.prior((5, 6))
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(attn.prior((5, 6)), expected)
    assert copy.deepcopy(attn).to(dtype).prior((5, 6)).dtype == torch.float32


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@pytest.mark.parametrize('mode', ['axial', 'mixed', 'normalized'])
def test_angles_in_float32_under_mixed_precision(mode, dtype):
    """Far from the first patch, an angle of half precision would be wrong by radians."""
    attn = build_attention(f'rotary-{mode}', None, 1, 2)
    hw = (2, 300)
    q, k = torch.randn(2, 1, 2, 601, WIDTH).to(dtype)
    params = {n: p.detach().double() for n, p in attn.named_parameters()}
    with torch.autocast('cpu', dtype=dtype):
        turned = attn.rotate(q, k, hw)
    for before, after in zip((q, k), turned, strict=True):
        assert after.dtype == dtype
        assert torch.equal(after[:, :, 0], before[:, :, 0])
        for h, i in ((0, 1), (1, 299), (0, 300), (1, 600)):
            spot = ((i - 1) % 300, (i - 1) // 300)
            there = rotated(before[:, h, i].double(), attn, params, h, spot, hw, (1, 1))
            expected = torch.cat((there.real, there.imag), dim=1).to(dtype)
            torch.testing.assert_close(after[:, h, i], expected, rtol=0.02, atol=0.01)


# --------------------------------------------------------------- rescaled coordinates


def draws(count=2000, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dict(rescale=None, jitter=None, device='cpu'), **kwargs)
    return torch.stack([draw_rescale(**kwargs) for _ in range(count)]).log2()


def test_factors_are_log_uniform_within_their_limits():
    same = draws(rescale=4.0)
    assert torch.equal(same[:, 0], same[:, 1])
    assert same.abs().max() <= 2 + 1e-6
    # A uniform distribution over -2 .. 2, by its quantiles.
    quantiles = torch.quantile(same[:, 0], torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(
        quantiles, torch.tensor([-1.6, -1.0, 0.0, 1.0, 1.6]), rtol=0, atol=0.15
    )
    each = draws(jitter=2.0)
    assert each.abs().max() <= 1 + 1e-6
    assert abs(torch.corrcoef(each.T)[0, 1]) < 0.1
    both = draws(rescale=4.0, jitter=2.0)
    assert 2.5 < both.abs().max() <= 3 + 1e-6
    assert (both[:, 0] - both[:, 1]).abs().max() <= 2 + 1e-6
    assert draws(10).eq(0).all()


def run(model, inputs, seed):
    torch.manual_seed(seed)
    return model(*inputs)


@every_method
def test_one_factor_a_step_for_all_layers(name):
    model = randomize(build(name, coords_rescale=3.0, coords_jitter=1.2))
    plain = build(name)
    plain.load_state_dict(model.state_dict())
    seen = []
    for layer in model.layers[:2]:
        layer.attn.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(kwargs['rescale']),
            with_kwargs=True,
        )
    x = torch.randn(IMAGES)
    outs = [run(model, (x,), seed)[0] for seed in range(6)]
    assert all(a is b for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert len({tuple(factors.tolist()) for factors in seen}) == 6
    # from torch's default generator, whose state a checkpoint holds
    assert torch.equal(run(model, (x,), 3)[0], outs[3])
    expected = plain(x)[0]
    assert not all(torch.allclose(out, expected) for out in outs)
    for layer in model.layers[:2]:
        layer.attn._forward_hooks.clear()
    assert torch.equal(model.eval()(x)[0], plain.eval()(x)[0])


@pytest.mark.parametrize('share', ['none', 'network'])
@every_method
def test_activation_checkpointing_takes_the_same_factor(name, share):
    if share == 'network' and name not in WITH_PRIOR:
        return
    cfg = dict(share_prior=share, coords_rescale=3.0, coords_jitter=1.2)
    model = randomize(build(name, **cfg))
    recomputing = build(name, **cfg, with_cp=True)
    recomputing.load_state_dict(model.state_dict())
    x = torch.randn(IMAGES)
    for net in (model, recomputing):
        loss_of(run(net, (x,), 1)[0]).backward()
    theirs = dict(model.named_parameters())
    for n, param in recomputing.named_parameters():
        torch.testing.assert_close(param.grad, theirs[n].grad, msg=n)


# ------------------------------------------------------------------ compiled, exported

# Every prior, every combination and every attention once.
ONE_EACH = [n for n in METHODS if n not in ('add-log', 'add-linear', 'add-table')]
ONE_EACH = [n for n in ONE_EACH if not n.startswith('both-') or n == 'both-table']


class Layers(nn.Module):
    """One layer of each method, and the outputs of all of them."""

    def __init__(self):
        super().__init__()
        layer_cfgs = []
        for name in ONE_EACH:
            attn, prior, heads, qkv_bias = METHODS[name]
            attn = {'type': 'SpatialPriorAttention', **attn}
            if prior:
                attn['prior'] = prior
            heads = 12 if 12 in heads else 4
            layer_cfgs.append(dict(attn_cfg=attn, num_heads=heads, qkv_bias=qkv_bias))
        self.backbone = SPViT(
            arch=dict(
                embed_dims=48,
                num_layers=len(ONE_EACH),
                num_heads=4,
                feedforward_channels=8,
            ),
            img_size=(16, 24),
            patch_size=8,
            num_spsa_layers=len(ONE_EACH),
            cls_token_layer=2,
            layer_cfgs=layer_cfgs,
            out_indices=list(range(len(ONE_EACH))),
            out_type='featmap',
        )
        randomize(self, std=0.3)

    def forward(self, images, mode='tensor'):
        return torch.stack(self.backbone(images), dim=1)  # (B, layers, C, H, W)


class Attentions(Layers):
    """The attentions of those layers alone, with one factor for the coordinates."""

    def forward(self, x, hw):
        rescale = draw_rescale(2.0, 1.5, x.device)
        outs = []
        for layer in self.backbone.layers:
            patches = x if layer.attn.num_extra_tokens else x[:, 1:]
            outs.append(layer.attn(patches, hw, rescale=rescale)[:, -hw[0] * hw[1] :])
        return torch.stack(outs, dim=1)  # (B, layers, N, C)


def check_each(found, expected):
    for i, name in enumerate(ONE_EACH):
        atol = 1e-5 * expected[:, i].detach().abs().max().item()
        torch.testing.assert_close(
            found[:, i], expected[:, i], rtol=0, atol=atol, msg=name
        )


def compiled(model, fullgraph):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    return torch.compile(model, backend=counter, fullgraph=fullgraph), counter


def test_compiles_into_one_graph_without_recompilation():
    model = Attentions()
    fast, counter = compiled(model, fullgraph=True)
    for seed in range(3):
        x = torch.randn(2, 1 + 15, 48)
        expected = run(model, (x, (3, 5)), seed)
        out = run(fast, (x, (3, 5)), seed)
        check_each(out, expected)
        loss_of(out).backward()
    assert counter.frame_count == 1


def test_a_model_with_rescaled_coordinates_compiles_without_recompilation():
    model = build('add-log', share_prior='network', coords_rescale=2.0)
    fast, counter = compiled(model, fullgraph=WHOLE_GRAPH)
    graphs = []
    for _ in range(3):
        loss_of(fast(torch.randn(IMAGES))[0]).backward()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3
    model.eval()
    x = torch.randn(IMAGES)
    torch.testing.assert_close(fast(x)[0], model(x)[0])


@torch.no_grad()
def test_onnx(tmp_path):
    model = Layers().eval()
    images = torch.randn(IMAGES)
    expected = model(images)
    path = str(tmp_path / 'model.onnx')
    export.save_onnx(export.prepare(model, IMAGES[2:]), path, images)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    found = session.run(None, {'images': images.numpy()})[0]
    check_each(torch.from_numpy(found), expected)


# 1:2, 2:1, the grid of the training, one row, and no multiple of a patch
SIZES = [(16, 32), (32, 16), (16, 24), (8, 40), (27, 33)]


@torch.no_grad()
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_trace_takes_any_size():
    """As torch's older exporter to ONNX records a model."""
    model = export.prepare(Layers(), IMAGES[2:], dynamic_size=True)
    traced = torch.jit.trace(model, torch.randn(IMAGES), check_trace=False)
    for size in SIZES:
        images = torch.randn(3, 3, *size)
        check_each(traced(images), model(images))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_any_size(tmp_path):
    model = export.prepare(Layers(), IMAGES[2:], dynamic_size=True)
    path = str(tmp_path / 'model.onnx')
    export.save_onnx(model, path, torch.randn(IMAGES), dynamic_size=True)
    run = export.open_file(path)
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        check_each(run(images), model(images))


# ----------------------------------------------------------- weight decay, bad input


@pytest.mark.parametrize('name', ['coords_rescale', 'coords_jitter'])
def test_coordinates_that_nothing_sees_are_not_rescaled(name):
    with pytest.raises(ValueError, match='num_spsa_layers=0 it sees nothing'):
        MODELS.build({**config('kerple'), 'num_spsa_layers': 0, name: 2.0})


@pytest.mark.parametrize(
    'path',
    [
        'classification/spvit-mini_1xb64-50e_digits.py',
        'classification/sp-deit-small_1xb64-ft-50e_custom.py',  # layer-wise
        'token_labeling/spvit-small_8xb128-tokenlabel-300e_in1k.py',
        'segmentation/spvit-small_upernet_8xb2-160k_ade20k-512x512.py',
        'segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py',
    ],
)
@pytest.mark.parametrize('name', ['kerple', 'rotary-mixed', 'score-no-bias', 'gated'])
def test_scalars_have_no_weight_decay_in_the_configs(name, path):
    head = dict(type='VisionTransformerClsHead', num_classes=2, in_channels=8)
    model = MODELS.build(dict(type='ImageClassifier', backbone=config(name), head=head))
    cfg = Config.fromfile(ROOT / 'configs' / path).optim_wrapper
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    decay = {n: decay[id(p)] for n, p in model.backbone.named_parameters()}
    assert decay['layers.0.attn.qkv.weight'] > 0
    own = {
        'kerple': ['prior.log_a', 'prior.log_p'],
        'rotary-mixed': ['freqs'],
        'score-no-bias': ['score', 'prior.b1', 'prior.b2'],
        'gated': ['gate'],
    }
    if path.startswith('segmentation'):  # LV-ViT's recipe decays biases
        own['score-no-bias'] = ['score']
    for n in own[name]:
        assert decay[f'layers.0.attn.{n}'] == 0, n


HARD = dict(type='WindowSpatialPrior')


@pytest.mark.parametrize('share_prior', ['none', 'network'])
@pytest.mark.parametrize(
    ('attn', 'prior', 'message'),
    [
        (dict(combine='sum'), None, r"`combine` .*'multiply', 'add', 'both'\).*'sum'"),
        (ADD, HARD, "`combine='add'` cannot take a hard Window.* to mask .*soft=True"),
        (dict(combine='both'), HARD, "`combine='both'` cannot take a hard Window"),
        (dict(ADD, init_score=1.0), None, '`init_score` .* init_score=1.0 .*add'),
        (dict(init_score=-1.0), None, '`init_score` .*at least 0.* init_score=-1.0'),
        (ADD, dict(type='MLPSpatialPrior', coords='r'), "`coords` .*'swinv2'.*'r'"),
        (ADD, dict(type='TableSpatialPrior', coords='log'), "`coords`.*'clamped'.*log"),
        (ADD, LOOKHERE, r'`num_heads` must be a multiple of 12, got 4.*`views`'),
        (ADD, dict(VIEWS, views=['up']), r"`views` .*4 heads, got \('up',\)"),
        (ADD, dict(VIEWS, views=['n'] * 4), r"`views` .*'all'\) .*got \('n'"),
        (ADD, dict(VIEWS, field_of_view=400), '`field_of_view` .* 360.* got 400'),
        (ADD, dict(type='LogCPBSpatialPrior', hidden_dims=0), '`hidden_dims`.* got 0'),
        (ADD, dict(type='KERPLESpatialPrior', num_heads=3), 'num_heads=3.*of 4 heads'),
        (
            None,
            dict(type='ALiBiSpatialPrior'),
            r"ALiBi.* is a bias.*combine='multiply'",
        ),
        (dict(combine='both'), VIEWS, r"LookHere.* is a bias.* combine='both'.*'add'"),
        (dict(strength=2.0), None, "`strength` .*strength=2.0 with combine='multiply'"),
        (dict(attn_impl='slow'), None, "`attn_impl` .*'chunked'.*'slow'"),
        (ADD, dict(VIEWS, coords='log'), "`coords` .*'clamped'.*'log'"),
        (None, dict(type='WindowSpatialPrior', coords='log'), "`coords` .*'log'"),
    ],
)
def test_bad_priors(attn, prior, message, share_prior):
    with pytest.raises(ValueError, match=message):
        build('gated', attn_cfg=attn, prior=prior, share_prior=share_prior)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(attn_cfg=dict(ROTARY, mode='2d')), "`mode` .*'normalized'.* got '2d'"),
        (dict(attn_cfg=dict(ROTARY, theta=0)), '`theta` must be above 0, got 0'),
        (dict(arch=dict(embed_dims=36)), 'embed_dims=36 and num_heads=4.* width of 9'),
        (dict(arch=dict(embed_dims=24)), 'embed_dims=24 and num_heads=4.* width of 6'),
        (dict(share_prior='network'), "`share_prior` belong to.* 'RotaryPosition"),
        (dict(share_prior='heads'), "`share_prior` belong to.* 'RotaryPosition"),
        (dict(prior=PRIORS['mlp']), "`prior` .*belong to.* 'RotaryPosition"),
        (dict(freeze_all_but_priors=True), 'no spatial prior with parameters'),
        (dict(coords_rescale=0.5), '`coords_rescale` .* at least 1, got 0.5'),
        (dict(coords_jitter=0), '`coords_jitter` .* at least 1, got 0'),
        (dict(coords_rescale=math.inf), '`coords_rescale` .* at least 1, got inf'),
    ],
)
def test_bad_arguments(kwargs, message):
    cfg = config('gated', attn_cfg=ROTARY)
    cfg.update({**kwargs, 'arch': {**cfg['arch'], **kwargs.get('arch', {})}})
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg)


def test_no_table_for_an_attention_without_a_prior():
    for name in METHODS:
        if name not in WITH_PRIOR:
            attn = build_attention(name, (2, 2), 0, METHODS[name].heads[0])
            x = torch.rand(1, 4, attn.embed_dims)
            with pytest.raises(ValueError, match='`omega`.* takes none'):
                attn(x, (2, 2), torch.ones(1, 3, 3))


# ------------------------------------------------------------------------- the page

PAGE = (ROOT / 'docs/positions.md').read_text()


def page_recipes():
    """The arguments of SPViT that follow each comment of the page, by the comment."""
    code = re.search(r'```python\n(.*?)```', PAGE, re.DOTALL)[1]
    recipes = {}
    for comment, lines in re.findall(r'# (.*)\n((?:[^#].*\n)+)', code):
        arguments = {}
        exec(lines, {}, arguments)
        views = arguments.pop('views', None)
        recipes[comment] = arguments, 36 if views is None else len(views)
    return recipes


def page_counts():
    """Parameters of a layer by method, as the page's table says."""
    table = re.search(r'\| method \|.*?\n\n', PAGE, re.DOTALL)[0]
    rows = [re.split(r' (?<!\\)\| ', line) for line in table.splitlines()[2:-1]]
    return {row[0].strip('| '): row[3].split(';')[0] for row in rows}


RECIPES = page_recipes()


def test_the_page_has_a_line_to_copy_for_every_row():
    assert {comment.split(':')[0] for comment in RECIPES} == set(page_counts())


@pytest.mark.parametrize('comment', RECIPES)
def test_lines_of_the_page(comment):
    """They build, run, and have the parameters that the page counts."""
    arguments, h = RECIPES[comment]
    d, grid_h, grid_w = 4, 2, 3
    arch = dict(embed_dims=h * d, num_layers=2, num_heads=h, feedforward_channels=8)
    model = SPViT(arch, img_size=(16, 24), patch_size=8, num_spsa_layers=1, **arguments)
    model.init_weights()
    assert model(torch.randn(IMAGES))[0].shape == (2, h * d)
    spatial, vanilla = (
        sum(param.numel() for param in layer.parameters()) for layer in model.layers
    )
    # '2 h (4 w + 1)' as an expression
    formula = re.sub(r'(?<=\d)(?=[a-zA-Z])', ' ', page_counts()[comment.split(':')[0]])
    formula = re.sub(r'(?<=[\w)]) (?=[\w(])', ' * ', formula)
    expected = eval(formula, dict(h=h, d=d, w=32, H=grid_h, W=grid_w))
    assert spatial - vanilla == expected
