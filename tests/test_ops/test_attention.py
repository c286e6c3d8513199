"""Every kernel against the formula, written out pair by pair in float64."""

import importlib
import inspect
import io
import math
import warnings
import weakref

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvit_mm.ops import chunked as chunked_module
from spvit_mm.ops import expand_prior, spatial_prior_attention
from spvit_mm.ops import flex as flex_module
from spvit_mm.ops.flex import (
    flex_attention,
    flex_attention_uncompiled,
    make_block_mask,
)
from tests.test_models import AUTOCAST_DTYPES

# The package's attribute of that name is not the module.
attention_module = importlib.import_module('spvit_mm.ops.attention')
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}
needs_flex = pytest.mark.skipif(
    flex_attention is None, reason='torch < 2.5 has no FlexAttention'
)


def naive_pairs(table, hw, extra=0, neutral=1.0):
    """A table's value of every pair by its definition, one pair at a time."""
    height, width = hw
    tokens = height * width
    pairs = np.full((table.shape[0], extra + tokens, extra + tokens), neutral)
    for i in range(tokens):
        for j in range(tokens):
            dy, dx = j // width - i // width, j % width - i % width
            value = table[:, dy + height - 1, dx + width - 1]
            pairs[:, extra + i, extra + j] = value
    return pairs


def naive_attention(q, k, v, prior, hw, extra, scale, bias=None, keep=None):
    """The formula in numpy, float64, one query at a time."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    omega, beta, kept = np.ones((1, 1, 1)), np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    if prior is not None:
        omega = naive_pairs(prior.detach().double().numpy(), hw, extra, 1.0)
    if bias is not None:
        beta = naive_pairs(bias.detach().double().numpy(), hw, extra, 0.0)
    if keep is not None:
        kept = naive_pairs(keep.numpy(), hw, extra, True)
    omega, beta, kept = (
        np.broadcast_to(x, (q.shape[1], q.shape[2], q.shape[2]))
        for x in (omega, beta, kept)
    )
    out = np.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                logits = omega[h, i] * (k[b, h] @ q[b, h, i]) * scale + beta[h, i]
                logits[kept[h, i] == 0] = -np.inf
                weights = np.exp(logits - logits.max())
                out[b, h, i] = weights @ v[b, h] / weights.sum()
    return torch.from_numpy(out)


def naive_gradients(q, k, v, prior, hw, extra, scale, grad, bias=None, keep=None):
    """Gradients of the same formula by autograd, with tables gathered pair by pair.

    Of q, k, v and those of prior and bias that are given, in this order.
    """
    height, width = hw
    position = [(i // width, i % width) for i in range(height * width)]

    def pairs(table, neutral):
        rows = [
            torch.stack(
                [
                    table[:, yj - yi + height - 1, xj - xi + width - 1]
                    for yj, xj in position
                ],
                dim=-1,
            )
            for yi, xi in position
        ]
        return torch.nn.functional.pad(
            torch.stack(rows, dim=1), (extra, 0, extra, 0), value=neutral
        )

    given = [x for x in (q, k, v, prior, bias) if x is not None]
    leaves = [x.detach().double().requires_grad_() for x in given]
    q, k, v, *tables = leaves
    logits = (q @ k.transpose(2, 3)) * scale
    if prior is not None:
        logits = pairs(tables[0], 1.0) * logits
    if bias is not None:
        logits = logits + pairs(tables[-1], 0.0)
    if keep is not None:
        logits = logits.masked_fill(~pairs(keep, True), -math.inf)
    return torch.autograd.grad(logits.softmax(-1) @ v, leaves, grad.double())


def sample(batch, heads, hw, extra, dim, table_heads, dtype, seed=0, strength=1.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = hw[0] * hw[1] + extra
    # The layout of a joint projection, as a layer hands it over.
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=generator) * strength
    q, k, v = (
        x.to(dtype).requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)
    )
    table = torch.randn(table_heads, 2 * hw[0] - 1, 2 * hw[1] - 1, generator=generator)
    kind = torch.promote_types(dtype, torch.float32)
    return q, k, v, (1 + 0.5 * table).to(kind).requires_grad_()


KINDS = [
    ('prior',),
    ('bias',),
    ('keep',),
    ('prior', 'bias'),
    ('prior', 'keep'),
    ('bias', 'keep'),
    ('prior', 'bias', 'keep'),
]


def sample_tables(kinds, hw, heads, dtype, seed=0, strength=1.0):
    """Tables by name; ``heads`` says how many heads each of the three has."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(dtype, torch.float32)
    tables = {}
    for name, count in zip(('prior', 'bias', 'keep'), heads, strict=True):
        x = torch.randn(count, 2 * hw[0] - 1, 2 * hw[1] - 1, generator=generator)
        if name == 'keep':
            x = x > 0.3
            x[:, hw[0] - 1, hw[1] - 1] = True
        else:
            x = (1 + 0.5 * x if name == 'prior' else strength * x).to(dtype)
            x.requires_grad_()
        if name in kinds:
            tables[name] = x
    return {'prior': None, **tables}


def assert_near(got, want, tolerance, what):
    error = (got.double() - want.double()).abs().max().item()
    size = max(want.double().abs().max().item(), 1e-3)
    assert error <= tolerance * size, f'{what}: {error:.2e} of {size:.2e}'


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of one grid row, so that small grids take several."""
    monkeypatch.setattr(chunked_module, '_BLOCK_BYTES', 1)


cases = st.fixed_dictionaries(
    {
        'batch': st.integers(1, 3),
        'heads': st.integers(1, 4),
        'hw': st.tuples(st.integers(1, 5), st.integers(1, 5)),
        'extra': st.integers(0, 2),
        'dim': st.sampled_from([1, 4, 8]),
        'shared': st.tuples(st.booleans(), st.booleans(), st.booleans()),
        'dtype': st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        'seed': st.integers(0, 2**31),
    }
)


def check_against_formula(impl, kinds, case, strength=1.0):
    args = [case[x] for x in ('batch', 'heads', 'hw', 'extra', 'dim')]
    q, k, v, _ = sample(*args, 1, case['dtype'], case['seed'], strength=strength)
    heads = [1 if shared else case['heads'] for shared in case['shared']]
    tables = sample_tables(kinds, case['hw'], heads, case['dtype'], case['seed'])
    scale = case['dim'] ** -0.5

    def run():
        return spatial_prior_attention(
            q,
            k,
            v,
            hw=case['hw'],
            **tables,
            num_extra_tokens=case['extra'],
            attn_impl=impl,
        )

    out = run()
    assert out.dtype == q.dtype
    assert out.shape == v.shape
    tolerance = TOLERANCE[case['dtype']]
    formula = dict(q=q, k=k, v=v, hw=case['hw'], extra=case['extra'], scale=scale)
    assert_near(out, naive_attention(**formula, **tables), tolerance, 'out')
    with torch.no_grad():
        assert_near(run(), out, tolerance, 'out without gradients')

    leaves = {'q': q, 'k': k, 'v': v}
    leaves.update((x, tables[x]) for x in ('prior', 'bias') if x in kinds)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(out.dtype)
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    # A gradient that cancels to nothing has no scale of its own: take the largest.
    want = naive_gradients(**formula, **tables, grad=grad)
    size = max(x.abs().max().item() for x in want)
    for name, one, other in zip(leaves, got, want, strict=True):
        error = (one.double() - other).abs().max().item()
        assert error <= 4 * tolerance * max(size, 1e-3), f'gradient of {name}: {error}'
        assert one.shape == other.shape


@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('impl', ['eager', 'chunked', 'auto', 'sdpa'])
@settings(max_examples=10, deadline=None)
@given(case=cases)
def test_kernels_follow_the_formula(impl, kinds, case):
    if impl == 'sdpa' and 'prior' in kinds:
        impl = 'auto'
    check_against_formula(impl, kinds, case)


@pytest.mark.parametrize('kinds', KINDS)
@settings(max_examples=10, deadline=None)
@given(case=cases, block=st.sampled_from([1, 600, 5000]))
def test_chunked_blocks_of_every_size(kinds, case, block):
    before = chunked_module._BLOCK_BYTES
    chunked_module._BLOCK_BYTES = block
    try:
        check_against_formula('chunked', kinds, case)
    finally:
        chunked_module._BLOCK_BYTES = before


@pytest.mark.parametrize('kinds', [x for x in KINDS if 'bias' in x])
@pytest.mark.parametrize('impl', ['eager', 'chunked'])
@pytest.mark.parametrize('extra', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_biases_far_outside_the_range_of_exp(dtype, extra, impl, kinds, small_blocks):
    # Rows whose sums of exp are 0, tiny, huge and infinite, beside harmless ones.
    hw = (5, 4)
    q, k, v, _ = sample(2, 3, hw, extra, 8, 1, dtype)
    tables = sample_tables(kinds, hw, (3, 3, 3), dtype)
    with torch.no_grad():
        tables['bias'].uniform_(-100, 100)
        tables['bias'][1].sub_(120)
        tables['bias'][2].add_(120)
    out = spatial_prior_attention(
        q, k, v, hw=hw, **tables, num_extra_tokens=extra, attn_impl=impl
    )
    formula = dict(q=q, k=k, v=v, hw=hw, extra=extra, scale=8**-0.5, **tables)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert_near(out, naive_attention(**formula), tolerance, 'out')
    leaves = [q, k, v, *(tables[x] for x in ('prior', 'bias') if x in kinds)]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad)
    size = max(x.abs().max().item() for x in want)
    for one, other in zip(got, want, strict=True):
        assert torch.isfinite(one).all()
        assert (one.double() - other).abs().max().item() <= 4 * tolerance * size


@pytest.mark.parametrize('impl', ['eager', 'chunked'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_logits_far_outside_the_range_of_exp(impl, dtype, small_blocks):
    # Logits of some hundreds overflow exp; a softmax is still well defined.
    q, k, v, table = sample(2, 2, (4, 3), 1, 8, 2, dtype, strength=12.0)
    out = spatial_prior_attention(
        q, k, v, table, (4, 3), num_extra_tokens=1, attn_impl=impl
    )
    want = naive_attention(q, k, v, table, (4, 3), 1, 8**-0.5)
    assert_near(out, want, 1e-3 if dtype == torch.float32 else 1e-11, 'out')
    grad = torch.ones_like(out)
    got = torch.autograd.grad(out, (q, k, v, table), grad)
    want = naive_gradients(q, k, v, table, (4, 3), 1, 8**-0.5, grad)
    for one, other in zip(got, want, strict=True):
        assert torch.isfinite(one).all()
        assert_near(one, other, 1e-2 if dtype == torch.float32 else 1e-9, 'gradient')


def test_all_logits_very_negative():
    # Every exp underflows without a shift; the weights are still uniform.
    q = torch.ones(1, 1, 6, 4)
    v = torch.arange(24.0).view(1, 1, 6, 4)
    table = torch.full((1, 3, 5), -500.0)
    out = spatial_prior_attention(q, q, v, table, (2, 3), attn_impl='chunked')
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def test_a_nan_shows_in_the_result():
    q, k, v, table = sample(1, 1, (2, 3), 0, 4, 1, torch.float32)
    with torch.no_grad():
        table[0, 0, 0] = math.nan
        for impl in ('eager', 'chunked'):
            out = spatial_prior_attention(q, k, v, table, (2, 3), attn_impl=impl)
            assert out.isnan().any()


@pytest.mark.parametrize('heads', [(1, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize('batch', [1, 2])
def test_chunked_gradcheck(batch, heads, small_blocks):
    q, k, v, _ = sample(batch, 2, (2, 3), 1, 3, 1, torch.float64)
    tables = sample_tables(KINDS[-1], (2, 3), heads, torch.float64)

    def run(q, k, v, prior, bias):
        return spatial_prior_attention(
            q,
            k,
            v,
            prior,
            (2, 3),
            bias=bias,
            keep=tables['keep'],
            num_extra_tokens=1,
            attn_impl='chunked',
        )

    inputs = (q, k, v, tables['prior'], tables['bias'])
    assert torch.autograd.gradcheck(run, inputs)


def test_eager_gradgradcheck():
    q, k, v, _ = sample(1, 1, (2, 2), 1, 2, 1, torch.float64)
    tables = sample_tables(KINDS[-1], (2, 2), (1, 1, 1), torch.float64)

    def run(q, k, v, prior, bias):
        return spatial_prior_attention(
            q,
            k,
            v,
            prior,
            (2, 2),
            bias=bias,
            keep=tables['keep'],
            num_extra_tokens=1,
            attn_impl='eager',
        )

    inputs = (q, k, v, tables['prior'], tables['bias'])
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize('frozen', ['q', 'prior', 'bias', 'prior bias'])
def test_chunked_with_fixed_tables_or_fixed_queries(frozen, small_blocks):
    q, k, v, _ = sample(2, 2, (3, 2), 0, 4, 1, torch.float64)
    tables = sample_tables(('prior', 'bias'), (3, 2), (2, 2, 2), torch.float64)
    inputs = {'q': q, 'k': k, 'v': v, **tables}
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    leaves = [x for x in inputs.values() if x.requires_grad]
    grads = []
    for impl in ('chunked', 'eager'):
        out = spatial_prior_attention(**inputs, hw=(3, 2), attn_impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@given(
    batch=st.integers(1, 12),
    heads=st.integers(1, 12),
    hw=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    extra=st.integers(0, 2),
    threads=st.integers(1, 40),
)
def test_blocks_are_equal_parts_that_fit(batch, heads, hw, extra, threads):
    plan = chunked_module.plan_blocks(batch, heads, hw, extra, 4, threads)
    assert batch % plan.images == 0
    assert heads % plan.heads == 0
    assert 1 <= plan.rows <= hw[0]
    if plan.images > 1:
        assert (plan.heads, plan.rows) == (heads, hw[0])
    assert plan.heads >= min(heads, threads)  # a head for each thread
    tokens = hw[0] * hw[1] + extra
    size = plan.images * plan.heads * plan.rows * hw[1] * tokens * 4
    assert size <= chunked_module._BLOCK_BYTES * threads or plan.rows == 1


# --- the prior


@settings(max_examples=30, deadline=None)
@given(hw=st.tuples(st.integers(1, 6), st.integers(1, 6)), heads=st.integers(1, 3))
def test_expand_prior_follows_its_definition(hw, heads):
    table = torch.arange(heads * (2 * hw[0] - 1) * (2 * hw[1] - 1.0)).view(
        heads, 2 * hw[0] - 1, 2 * hw[1] - 1
    )
    omega = expand_prior(table, hw)
    assert np.array_equal(omega.numpy(), naive_pairs(table.numpy(), hw))


@pytest.mark.parametrize('impl', ['eager', 'chunked', 'sdpa'])
@pytest.mark.parametrize('kinds', KINDS)
def test_neutral_tables_are_vanilla_attention(impl, kinds):
    if impl == 'sdpa' and 'prior' in kinds:
        impl = 'auto'
    hw = (4, 5)
    q, k, v, _ = sample(2, 3, hw, 2, 8, 3, torch.float32)
    neutral = {'prior': torch.ones, 'bias': torch.zeros, 'keep': torch.ones}
    dtypes = {'keep': torch.bool}
    tables = {x: neutral[x](3, 7, 9, dtype=dtypes.get(x)) for x in kinds}
    tables = {'prior': None, **tables}
    for scale in (None, 0.7):
        rest = dict(hw=hw, num_extra_tokens=2, scale=scale)
        vanilla = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        plain = spatial_prior_attention(q, k, v, None, **rest)
        torch.testing.assert_close(plain, vanilla)
        ours = spatial_prior_attention(q, k, v, **tables, **rest, attn_impl=impl)
        torch.testing.assert_close(ours, vanilla)


# --- dropout


@pytest.mark.parametrize('impl', ['eager', 'chunked'])
def test_dropout_is_random_unbiased_and_repeats_with_the_seed(impl, small_blocks):
    q, k, v, table = sample(1, 2, (3, 4), 1, 4, 2, torch.float64)

    def run(p=0.3):
        return spatial_prior_attention(
            q,
            k,
            v,
            table,
            (3, 4),
            num_extra_tokens=1,
            dropout_p=p,
            attn_impl=impl,
        )

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    with torch.no_grad():
        plain = run(0.0)
        draws = torch.stack([run() for _ in range(600)])
        assert run(1.0).abs().max() == 0
    error = (draws.mean(0) - plain).abs()
    # Five standard errors of each entry's own mean.
    assert (error <= 5 * draws.std(0) / math.sqrt(len(draws))).all()


@pytest.mark.parametrize('far', [0, 120])
def test_chunked_dropout_reuses_its_masks_backward(far, small_blocks):
    q, k, v, _ = sample(2, 2, (2, 3), 1, 3, 1, torch.float64)
    tables = sample_tables(KINDS[-1], (2, 3), (1, 2, 1), torch.float64)
    with torch.no_grad():  # far: the second head is done again, with a shift
        tables['bias'][1].add_(far)

    def run(q, k, v, prior, bias):
        torch.manual_seed(5)
        return spatial_prior_attention(
            q,
            k,
            v,
            prior,
            (2, 3),
            bias=bias,
            keep=tables['keep'],
            num_extra_tokens=1,
            dropout_p=0.4,
            attn_impl='chunked',
        )

    # Numeric differences see the mask of the forward pass, the analytic ones the
    # mask of the backward pass: they agree only if the two are the same.
    inputs = (q, k, v, tables['prior'], tables['bias'])
    assert torch.autograd.gradcheck(run, inputs)


# --- autocast, inference mode, tracing, compiling, exporting


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('impl', ['auto', 'eager', 'chunked', 'sdpa'])
def test_autocast_gives_what_attention_gives(impl, kinds, dtype):
    if impl == 'sdpa' and 'prior' in kinds:
        impl = 'auto'
    q, k, v, _ = sample(2, 2, (4, 4), 1, 8, 2, torch.float32)
    tables = sample_tables(kinds, (4, 4), (2, 2, 2), torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        vanilla = spatial_prior_attention(q, k, v, None, (4, 4), num_extra_tokens=1)
        out = spatial_prior_attention(
            q, k, v, hw=(4, 4), **tables, num_extra_tokens=1, attn_impl=impl
        )
    assert out.dtype == vanilla.dtype == dtype
    want = naive_attention(q, k, v, hw=(4, 4), extra=1, scale=8**-0.5, **tables)
    assert_near(out, want, TOLERANCE[torch.bfloat16], 'out')
    leaves = [q, k, v, *(tables[x] for x in ('prior', 'bias') if x in kinds)]
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(x.dtype == torch.float32 for x in grads)


def test_auto_keeps_a_large_bias_in_float32_under_autocast():
    # Rounded to bfloat16, 100 is known to 0.25: half of the weights would be wrong.
    q, k, v, _ = sample(1, 1, (4, 4), 0, 8, 1, torch.float32)
    bias = 100 + torch.randn(1, 7, 7)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        out = spatial_prior_attention(q, k, v, None, (4, 4), bias=bias)
    want = naive_attention(q, k, v, None, (4, 4), 0, 8**-0.5, bias=bias)
    assert_near(out, want, 2e-2, 'out')


@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('impl', ['auto', 'eager', 'chunked'])
def test_inference_mode_leaves_inputs_alone(impl, kinds):
    q, k, v, _ = sample(2, 2, (3, 3), 0, 8, 2, torch.float32)
    tables = sample_tables(kinds, (3, 3), (2, 2, 2), torch.float32)
    inputs = {'q': q, 'k': k, 'v': v, **tables}
    before = {name: x.clone() for name, x in inputs.items() if x is not None}
    want = spatial_prior_attention(**inputs, hw=(3, 3), attn_impl=impl)
    with torch.inference_mode():
        out = spatial_prior_attention(**inputs, hw=(3, 3), attn_impl=impl)
    torch.testing.assert_close(out, want.detach())
    for name, x in before.items():
        assert torch.equal(inputs[name], x)


class _Layer(torch.nn.Module):
    def __init__(self, impl='auto', kinds=('prior',)):
        super().__init__()
        tables = sample_tables(kinds, (3, 4), (2, 2, 2), torch.float32)
        for name in ('prior', 'bias'):
            table = tables.get(name)
            table = None if table is None else torch.nn.Parameter(table.detach())
            self.register_parameter(name, table)
        self.register_buffer('keep', tables.get('keep'))
        self.impl = impl

    def forward(self, q):
        return spatial_prior_attention(
            q,
            2 * q,
            q + 1,
            self.prior,
            (3, 4),
            bias=self.bias,
            keep=self.keep,
            num_extra_tokens=1,
            attn_impl=self.impl,
        )


@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('impl', ['auto', 'chunked'])
def test_traces_count_the_same_products_and_keep_the_batch_free(impl, kinds, recwarn):
    layer, q = _Layer(impl, kinds), torch.randn(2, 2, 13, 16)
    traced = torch.jit.trace(layer, q)
    assert str(traced.inlined_graph).count('aten::matmul') == 2
    wider = torch.cat([q, q, q])
    torch.testing.assert_close(traced(wider), layer(wider))
    assert not [x for x in recwarn if x.category is torch.jit.TracerWarning]


@pytest.mark.parametrize(
    ('impl', 'kinds'),
    [('auto', x) for x in KINDS] + [('chunked', KINDS[0]), ('chunked', KINDS[-1])],
)
def test_compiles_as_one_graph_and_once_per_shape(impl, kinds):
    import torch._dynamo.testing

    torch._dynamo.reset()
    layer, q = _Layer(impl, kinds), torch.randn(2, 2, 13, 16)
    params = list(layer.parameters())
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        x, y = q.clone().requires_grad_(), q.clone().requires_grad_()
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *params])
        want = torch.autograd.grad(layer(y).square().sum(), [y, *params])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(q), layer(q))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.skipif(
    not hasattr(torch.export, 'Dim'), reason='torch < 2.2 has no torch.export.Dim'
)
@pytest.mark.parametrize('kinds', KINDS)
def test_exports_with_a_free_batch(kinds):
    layer, q = _Layer('auto', kinds).eval(), torch.randn(2, 2, 13, 16)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(layer, (q,), dynamic_shapes=({0: batch},))
    wider = torch.cat([q, q, q])
    call = program.module() if hasattr(program, 'module') else program
    torch.testing.assert_close(call(wider), layer(wider))


@pytest.mark.parametrize('kinds', KINDS)
def test_onnx_gives_the_same(kinds):
    layer, q = _Layer('auto', kinds).eval(), torch.randn(2, 2, 13, 16)
    file = io.BytesIO()
    # Before torch 2.5 there is no other exporter.
    has_two = 'dynamo' in inspect.signature(torch.onnx.export).parameters
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter, and of what it folds
        torch.onnx.export(
            layer,
            (q,),
            file,
            input_names=['q'],
            dynamic_axes={'q': {0: 'batch'}},
            opset_version=17,
            **(dict(dynamo=False) if has_two else {}),
        )
    session = onnxruntime.InferenceSession(file.getvalue())
    wider = torch.cat([q, q, q])
    (got,) = session.run(None, {'q': wider.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(got), layer(wider).detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ('kinds', 'changes', 'expected'),
    [
        (('prior',), {}, 'chunked'),
        (('prior', 'bias'), {}, 'chunked'),
        (('bias',), {}, 'sdpa'),
        (('keep',), {}, 'sdpa'),
        (('bias', 'keep'), {}, 'sdpa'),
        (('bias',), {'hw': (28, 28)}, 'chunked'),  # the mask takes 4.9 MB
        (('bias',), {'dropout_p': 0.1}, 'chunked'),
        (('bias',), {'dtype': torch.bfloat16}, 'chunked'),
        (('bias',), {'learned': True}, 'chunked'),
    ],
)
def test_what_auto_takes_on_the_cpu(monkeypatch, kinds, changes, expected):
    taken = []
    for name in ('eager', 'chunked', 'sdpa'):
        kernel = getattr(attention_module, f'{name}_attention')

        def spy(*args, name=name, kernel=kernel, **kwargs):
            taken.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(attention_module, f'{name}_attention', spy)
    hw, dtype = changes.get('hw', (4, 5)), changes.get('dtype', torch.float32)
    q, k, v, _ = sample(1, 2, hw, 0, 8, 1, dtype)
    tables = sample_tables(kinds, hw, (2, 2, 2), dtype)
    for table in tables.values():
        if table is not None and table.is_floating_point():
            table.requires_grad_('learned' in changes)
    dropout_p = changes.get('dropout_p', 0.0)
    spatial_prior_attention(q, k, v, hw=hw, **tables, dropout_p=dropout_p)
    assert taken == [expected]


# --- memory


def saved_and_peak_elements(hw, kinds):
    """Elements saved for backward, and the largest tensor made, by one layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes() // 4)
            return out

    q, k, v, _ = sample(1, 2, hw, 0, 8, 2, torch.float32)
    tables = sample_tables(kinds, hw, (2, 2, 2), torch.float32)
    leaves = [q, k, v, *(tables[x] for x in ('prior', 'bias') if x in kinds)]
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = spatial_prior_attention(q, k, v, hw=hw, **tables, attn_impl='chunked')
        torch.autograd.grad(out.sum(), leaves)
    return sum(saved), seen.size


@pytest.mark.parametrize('kinds', KINDS)
def test_chunked_memory_grows_with_the_tokens_not_their_square(kinds, small_blocks):
    grids = ((8, 8), (16, 16), (32, 32))
    saved, largest = zip(
        *(saved_and_peak_elements(x, kinds) for x in grids), strict=True
    )
    # Four times the tokens: what is saved grows by 4, the largest buffer (blocks of
    # one grid row, and the strip) by 8; all pairs would grow by 16.
    for i in (0, 1):
        assert saved[i + 1] <= 4.2 * saved[i]
        assert largest[i + 1] <= 8.5 * largest[i]
    assert largest[2] < 2 * 1024**2 / 4


# --- FlexAttention


@needs_flex
@pytest.mark.parametrize('kinds', [('prior',), ('bias',), ('prior', 'bias')])
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_flex_uncompiled_follows_the_formula(kinds, case):
    hw, extra = case['hw'], case['extra']
    q, k, v, _ = sample(
        case['batch'], case['heads'], hw, extra, 8, 1, torch.float32, case['seed']
    )
    heads = [1 if shared else case['heads'] for shared in case['shared']]
    tables = sample_tables(kinds, hw, heads, torch.float32, case['seed'])
    prior, bias = tables.get('prior'), tables.get('bias')
    formula = (q, k, v, prior, hw, extra, 8**-0.5)
    # On the CPU FlexAttention differentiates with respect to the tables alone, and
    # only uncompiled.
    q, k, v = (x.detach() for x in (q, k, v))
    out = flex_attention_uncompiled(q, k, v, prior, bias, hw, 8**-0.5, extra)
    want = naive_attention(*formula, bias=bias)
    assert_near(out, want, TOLERANCE[torch.float32], 'out')
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, [tables[x] for x in kinds], grad)
    want = naive_gradients(*formula, grad, bias=bias)
    size = max(x.abs().max().item() for x in want)
    for one, other in zip(got, want[3:], strict=True):
        assert (one.double() - other).abs().max() <= 1e-4 * size


@needs_flex
@pytest.mark.slow
@pytest.mark.parametrize('kinds', [KINDS[0], KINDS[-1]])
def test_flex_compiled_on_the_cpu(kinds):
    q, k, v, _ = sample(1, 2, (8, 8), 1, 16, 2, torch.float32)
    tables = sample_tables(kinds, (8, 8), (2, 2, 2), torch.float32)
    with torch.no_grad():
        out = spatial_prior_attention(
            q, k, v, hw=(8, 8), **tables, num_extra_tokens=1, attn_impl='flex'
        )
    want = naive_attention(q, k, v, hw=(8, 8), extra=1, scale=0.25, **tables)
    assert_near(out, want, TOLERANCE[torch.float32], 'out')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('impl', ['eager', 'chunked', 'sdpa', 'flex', 'auto'])
@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernels_on_cuda(impl, kinds, dtype):
    if impl == 'sdpa' and 'prior' in kinds:
        impl = 'auto'
    q, k, v, _ = sample(2, 2, (8, 12), 1, 16, 2, dtype)
    inputs = {'q': q, 'k': k, 'v': v}
    inputs.update(sample_tables(kinds, (8, 12), (2, 2, 2), dtype))
    moved = {
        name: None if x is None else x.detach().cuda().requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }
    out = spatial_prior_attention(
        **moved, hw=(8, 12), num_extra_tokens=1, attn_impl=impl
    )
    formula = dict(**inputs, hw=(8, 12), extra=1, scale=0.25)
    # TF32 is off by default; FlexAttention's float32 products may still use it.
    tolerance = 4e-2 if dtype == torch.bfloat16 else 2e-3
    assert_near(out.cpu(), naive_attention(**formula), tolerance, 'out')
    grad = torch.ones_like(out)
    leaves = [x for x in moved.values() if x is not None and x.requires_grad]
    got = torch.autograd.grad(out, leaves, grad)
    want = naive_gradients(**formula, grad=grad.cpu())
    for one, other in zip(got, want, strict=True):
        assert_near(one.cpu(), other, 4 * tolerance, 'gradient')


# --- errors


def call(**changes):
    q, k, v, table = sample(1, 2, (3, 4), 0, 8, 2, torch.float32)
    given_args = {'q': q, 'k': k, 'v': v, 'prior': table, 'hw': (3, 4), **changes}
    return spatial_prior_attention(**given_args)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'hw': (4, 4)}, r'hw=\(4, 4\).* 16 tokens, but `q` holds 12'),
        ({'num_extra_tokens': 1}, r'13 tokens, but `q` holds 12'),
        ({'num_extra_tokens': -1}, 'num_extra_tokens.*-1'),
        ({'hw': (4, 3)}, r'\(heads, 7, 5\).*\(2, 5, 7\)'),
        ({'prior': torch.ones(3, 5, 7)}, 'one head or as many as `q`, 2, but got 3'),
        ({'prior': torch.ones(5, 7)}, r'\(heads, 2H-1, 2W-1\)'),
        ({'bias': torch.ones(2, 5, 8)}, r'`bias` must have the shape.*\(2, 5, 8\)'),
        ({'bias': torch.ones(3, 5, 7)}, '`bias` must have one head .* but got 3'),
        ({'keep': torch.ones(2, 5, 7)}, '`keep` must be bool, but got torch.float32'),
        ({'keep': torch.eye(7)[None, :5] > 0}, 'keep the zero offset of every head'),
        ({'attn_impl': 'sdpa'}, "'sdpa' adds and masks only, but got a `prior`"),
        ({'k': torch.ones(1, 2, 11, 8)}, r'\(1, 2, 11, 8\)'),
        ({'v': torch.ones(1, 2, 12, 8).double()}, 'one floating-point dtype'),
        ({'attn_impl': 'flash'}, "must be one of .*'chunked'.* got 'flash'"),
        ({'dropout_p': 1.5}, r'\[0, 1\].*1.5'),
        ({'attn_impl': 'flex'}, "'flex' cannot run here.*'eager' and 'chunked' can"),
    ],
)
def test_bad_input_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


# --- FlexAttention's kernels: compiled for each shape, tried first under 'auto'


class Backend:
    """Runs the captured graph as it is, in place of Triton, and counts the graphs."""

    def __init__(self, work=None):
        self.graphs = 0
        self.work = work

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.work is None:
            return graph.forward
        return lambda *args: [self.work(x) for x in graph.forward(*args)]


@pytest.fixture
def flex_backend(monkeypatch):
    """Let 'auto' choose on the CPU as it does on CUDA, with a backend of ours."""

    def install(work=None):
        backend = Backend(work)
        monkeypatch.setattr(flex_module, 'BACKEND', backend)
        return backend

    def start_anew():
        torch._dynamo.reset()
        flex_module._kernel.cache_clear()

    monkeypatch.setattr(attention_module, '_choose', lambda *_: 'flex')
    monkeypatch.setattr(flex_module, '_tried', set())
    monkeypatch.setattr(flex_module, '_ended', set())
    start_anew()
    yield install
    start_anew()


def on_grid(hw, attn_impl='auto', **tables):
    """Attention on a grid, by one kernel and by the eager one."""
    q, k, v, prior = sample(1, 2, hw, 1, 16, 2, torch.float32)
    q, k, v = (x.detach() for x in (q, k, v))
    tables = tables or {'prior': prior.detach()}
    tables = {'prior': None, **tables}
    return [
        spatial_prior_attention(
            q, k, v, hw=hw, **tables, num_extra_tokens=1, attn_impl=impl
        )
        for impl in (attn_impl, 'eager')
    ]


@needs_flex
@pytest.mark.parametrize(('impl', 'shapes'), [('auto', 20), ('flex', 10)])
def test_flex_compiles_every_shape_and_keeps_it(flex_backend, impl, shapes):
    # torch itself runs a function uncompiled after 8.
    backend = flex_backend()
    grids = [(2, width) for width in range(2, 2 + shapes)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for hw in (*grids, *grids):
            torch.testing.assert_close(*on_grid(hw, impl))
    assert backend.graphs == shapes


@needs_flex
@pytest.mark.parametrize('kinds', KINDS)
@pytest.mark.parametrize('heads', [1, 2])
@torch.no_grad()
def test_flex_follows_every_table_with_one_kernel(flex_backend, kinds, heads):
    backend = flex_backend()
    for seed in range(3):
        tables = sample_tables(kinds, (3, 4), (heads,) * 3, torch.float32, seed)
        torch.testing.assert_close(*on_grid((3, 4), **tables))
    assert backend.graphs == 1


@needs_flex
@torch.no_grad()
def test_flex_makes_the_mask_of_a_table_once_until_it_changes(
    flex_backend, monkeypatch
):
    flex_backend()
    made = []
    make = flex_module.make_block_mask
    monkeypatch.setattr(
        flex_module, 'make_block_mask', lambda *args: made.append(1) or make(*args)
    )
    keep = sample_tables(('keep',), (3, 4), (1, 1, 1), torch.float32)['keep']
    for _ in range(3):
        torch.testing.assert_close(*on_grid((3, 4), keep=keep))
    assert len(made) == 1
    before = on_grid((3, 4), keep=keep)[0]
    keep.logical_not_()
    keep[:, 2, 3] = True
    after, want = on_grid((3, 4), keep=keep)
    torch.testing.assert_close(after, want)
    assert not torch.equal(after, before)
    assert len(made) == 2
    # The mask does not keep the table alive.
    table = weakref.ref(keep)
    del keep
    assert table() is None


@needs_flex
def test_a_block_mask_leaves_out_whole_blocks():
    hw = (16, 32)  # blocks of 128 tokens are four rows
    keep = torch.zeros(1, 31, 63, dtype=torch.bool)
    keep[:, 15, :] = True  # the query's own row
    assert make_block_mask(keep, hw, 0).sparsity() == pytest.approx(75)


@needs_flex
def test_auto_says_once_that_more_shapes_are_not_compiled(flex_backend, monkeypatch):
    backend = flex_backend()
    monkeypatch.setattr(flex_module, 'MAX_KERNELS', 2)
    on_grid((2, 2))
    on_grid((2, 3))
    with pytest.warns(RuntimeWarning, match='for 2 shapes') as caught:
        torch.testing.assert_close(*on_grid((2, 4)))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for width in (2, 3, 4, 5):
            on_grid((2, width))
    assert backend.graphs == 2
    torch.testing.assert_close(*on_grid((2, 4), 'flex'))
    assert backend.graphs == 3


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError('no kernel\nand a long story')


def fails_forward(out):
    raise RuntimeError('no kernel\nand a long story')


@needs_flex
@pytest.mark.parametrize('work', [fails_forward, FailsBackward.apply])
def test_auto_falls_back_where_flex_does_not_compile(flex_backend, work):
    backend = flex_backend(work)
    table = torch.randn(2, 3, 5).requires_grad_()
    with pytest.warns(RuntimeWarning, match=r'RuntimeError: no kernel\)') as caught:
        out, expected = on_grid((2, 3), prior=table)
    assert len(caught) == 1
    torch.testing.assert_close(out, expected)
    got, want = (
        torch.autograd.grad(x.square().sum(), table)[0] for x in (out, expected)
    )
    torch.testing.assert_close(got, want)
    # told once, and not tried again with other shapes
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        on_grid((2, 4), prior=torch.randn(2, 3, 7).requires_grad_())
    assert backend.graphs == 1


@needs_flex
def test_running_out_of_memory_is_not_flex_to_blame(flex_backend):
    def work(out):
        raise torch.cuda.OutOfMemoryError('full')

    flex_backend(work)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        on_grid((2, 3))


def test_expand_prior_refuses_another_grid():
    with pytest.raises(ValueError, match=r'grid hw=\(4, 4\), but got \(2, 5, 7\)'):
        expand_prior(torch.ones(2, 5, 7), (4, 4))
    with pytest.raises(ValueError, match='two positive numbers'):
        expand_prior(torch.ones(2, 5, 7), (0, 4))


def test_flex_says_what_it_lacks():
    with torch.no_grad():
        with pytest.raises(ValueError, match='dropout_p=0.1|no FlexAttention'):
            call(attn_impl='flex', dropout_p=0.1)
        q = torch.ones(1, 2, 12, 8).double()
        with pytest.raises(ValueError, match='float64|no FlexAttention'):
            call(attn_impl='flex', q=q, k=q, v=q)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_exp_of_what_is_far_below(dtype):
    """The same as torch's, but for numbers too small to be ordinary, which are 0."""
    tiny = torch.finfo(dtype).tiny
    least = math.log(tiny)
    x = torch.tensor(
        [-math.inf, 2 * least, least - 1, least + 2, -3, 0, 5], dtype=dtype
    )
    want = torch.where(x.exp() > 2 * tiny, x.exp(), 0.0)
    assert want.count_nonzero() == 4
    torch.testing.assert_close(chunked_module.exp_(x.clone(), True), want)
    nan = torch.tensor([math.nan, math.inf], dtype=dtype)
    torch.testing.assert_close(
        chunked_module.exp_(nan.clone(), True), nan, equal_nan=True
    )
