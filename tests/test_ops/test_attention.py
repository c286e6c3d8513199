"""Every kernel against the formula, written out pair by pair in float64."""

import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spvit_mm.ops import chunked as chunked_module
from spvit_mm.ops import expand_prior, spatial_prior_attention
from spvit_mm.ops import flex as flex_module
from spvit_mm.ops.flex import flex_attention, flex_attention_uncompiled

# The package's attribute of that name is not the module.
attention_module = importlib.import_module('spvit_mm.ops.attention')
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}
needs_flex = pytest.mark.skipif(
    flex_attention is None, reason='torch < 2.5 has no FlexAttention'
)


def naive_omega(table, hw):
    """omega[h, i, j] by its definition, one pair at a time."""
    height, width = hw
    tokens = height * width
    omega = np.empty((table.shape[0], tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            dy, dx = j // width - i // width, j % width - i % width
            omega[:, i, j] = table[:, dy + height - 1, dx + width - 1]
    return omega


def naive_attention(q, k, v, table, hw, extra, scale):
    """The formula in numpy, float64, one query at a time."""
    q, k, v, table = (x.detach().double().numpy() for x in (q, k, v, table))
    omega = np.ones((table.shape[0], q.shape[2], q.shape[2]))
    omega[:, extra:, extra:] = naive_omega(table, hw)
    out = np.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                logits = omega[h % len(omega), i] * (k[b, h] @ q[b, h, i]) * scale
                weights = np.exp(logits - logits.max())
                out[b, h, i] = weights @ v[b, h] / weights.sum()
    return torch.from_numpy(out)


def naive_gradients(q, k, v, table, hw, extra, scale, grad):
    """Gradients of the same formula by autograd, with omega gathered pair by pair."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, table)]
    q, k, v, table = leaves
    height, width = hw
    position = [(i // width, i % width) for i in range(height * width)]
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
    omega = torch.nn.functional.pad(
        torch.stack(rows, dim=1), (extra, 0, extra, 0), value=1.0
    )
    attn = (omega * (q @ k.transpose(2, 3)) * scale).softmax(-1)
    return torch.autograd.grad(attn @ v, leaves, grad.double())


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
        'heads': st.integers(1, 3),
        'hw': st.tuples(st.integers(1, 5), st.integers(1, 5)),
        'extra': st.integers(0, 2),
        'dim': st.sampled_from([1, 4, 8]),
        'shared': st.booleans(),
        'dtype': st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        'seed': st.integers(0, 2**31),
    }
)


def check_against_formula(impl, case, strength=1.0):
    table_heads = 1 if case['shared'] else case['heads']
    args = [case[x] for x in ('batch', 'heads', 'hw', 'extra', 'dim')]
    q, k, v, table = sample(
        *args, table_heads, case['dtype'], case['seed'], strength=strength
    )
    scale = case['dim'] ** -0.5
    rest = {'num_extra_tokens': case['extra'], 'attn_impl': impl}
    out = spatial_prior_attention(q, k, v, table, case['hw'], **rest)
    assert out.dtype == q.dtype
    assert out.shape == v.shape
    tolerance = TOLERANCE[case['dtype']]
    formula = (q, k, v, table, case['hw'], case['extra'], scale)
    assert_near(out, naive_attention(*formula), tolerance, 'out')
    with torch.no_grad():
        again = spatial_prior_attention(q, k, v, table, case['hw'], **rest)
    assert_near(again, out, tolerance, 'out without gradients')

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(out.dtype)
    got = torch.autograd.grad(out, (q, k, v, table), grad)
    # A gradient that cancels to nothing has no scale of its own: take the largest.
    want = naive_gradients(*formula, grad)
    size = max(x.abs().max().item() for x in want)
    for name, one, other in zip(('q', 'k', 'v', 'table'), got, want, strict=True):
        error = (one.double() - other).abs().max().item()
        assert error <= 4 * tolerance * max(size, 1e-3), f'gradient of {name}: {error}'
        assert one.shape == other.shape


@pytest.mark.parametrize('impl', ['eager', 'chunked', 'auto'])
@settings(max_examples=25, deadline=None)
@given(case=cases)
def test_kernels_follow_the_formula(impl, case):
    check_against_formula(impl, case)


@settings(max_examples=25, deadline=None)
@given(case=cases, block=st.sampled_from([1, 600, 5000]))
def test_chunked_blocks_of_every_size(case, block):
    before = chunked_module._BLOCK_BYTES
    chunked_module._BLOCK_BYTES = block
    try:
        check_against_formula('chunked', case)
    finally:
        chunked_module._BLOCK_BYTES = before


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


@pytest.mark.parametrize('table_heads', [1, 2])
@pytest.mark.parametrize('batch', [1, 2])
def test_chunked_gradcheck(batch, table_heads, small_blocks):
    q, k, v, table = sample(batch, 2, (2, 3), 1, 3, table_heads, torch.float64)

    def run(q, k, v, table):
        return spatial_prior_attention(
            q, k, v, table, (2, 3), num_extra_tokens=1, attn_impl='chunked'
        )

    assert torch.autograd.gradcheck(run, (q, k, v, table))


def test_eager_gradgradcheck():
    q, k, v, table = sample(1, 1, (2, 2), 1, 2, 1, torch.float64)

    def run(q, k, v, table):
        return spatial_prior_attention(
            q, k, v, table, (2, 2), num_extra_tokens=1, attn_impl='eager'
        )

    assert torch.autograd.gradgradcheck(run, (q, k, v, table))


def test_chunked_with_a_fixed_table_or_fixed_queries():
    q, k, v, table = sample(2, 2, (3, 2), 0, 4, 2, torch.float64)
    for frozen in (q, table):
        frozen.requires_grad_(False)
        leaves = [x for x in (q, k, v, table) if x.requires_grad]
        grads = []
        for impl in ('chunked', 'eager'):
            out = spatial_prior_attention(q, k, v, table, (3, 2), attn_impl=impl)
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
        frozen.requires_grad_(True)


# --- the prior


@settings(max_examples=30, deadline=None)
@given(hw=st.tuples(st.integers(1, 6), st.integers(1, 6)), heads=st.integers(1, 3))
def test_expand_prior_follows_its_definition(hw, heads):
    table = torch.arange(heads * (2 * hw[0] - 1) * (2 * hw[1] - 1.0)).view(
        heads, 2 * hw[0] - 1, 2 * hw[1] - 1
    )
    omega = expand_prior(table, hw)
    assert np.array_equal(omega.numpy(), naive_omega(table.numpy(), hw))


@pytest.mark.parametrize('impl', ['eager', 'chunked'])
def test_the_neutral_prior_is_vanilla_attention(impl):
    q, k, v, table = sample(2, 3, (4, 5), 2, 8, 3, torch.float32)
    vanilla = spatial_prior_attention(q, k, v, None, (4, 5), num_extra_tokens=2)
    ours = spatial_prior_attention(
        q,
        k,
        v,
        torch.ones_like(table),
        (4, 5),
        num_extra_tokens=2,
        attn_impl=impl,
    )
    torch.testing.assert_close(ours, vanilla)
    # Its custom scale is used as well.
    vanilla = spatial_prior_attention(q, k, v, None, (4, 5), scale=0.7)
    ones = torch.ones_like(table)
    ours = spatial_prior_attention(
        q, k, v, ones, (4, 5), scale=0.7, num_extra_tokens=2, attn_impl=impl
    )
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


def test_chunked_dropout_reuses_its_masks_backward(small_blocks):
    q, k, v, table = sample(2, 1, (2, 3), 1, 3, 1, torch.float64)

    def run(q, k, v, table):
        torch.manual_seed(5)
        return spatial_prior_attention(
            q,
            k,
            v,
            table,
            (2, 3),
            num_extra_tokens=1,
            dropout_p=0.4,
            attn_impl='chunked',
        )

    # Numeric differences see the mask of the forward pass, the analytic ones the
    # mask of the backward pass: they agree only if the two are the same.
    assert torch.autograd.gradcheck(run, (q, k, v, table))


# --- autocast, inference mode, tracing, compiling, exporting


@pytest.mark.parametrize('impl', ['eager', 'chunked'])
def test_autocast_gives_what_attention_gives(impl):
    q, k, v, table = sample(2, 2, (4, 4), 1, 8, 2, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        vanilla = spatial_prior_attention(q, k, v, None, (4, 4))
        out = spatial_prior_attention(
            q, k, v, table, (4, 4), num_extra_tokens=1, attn_impl=impl
        )
    assert out.dtype == vanilla.dtype == torch.bfloat16
    want = naive_attention(q, k, v, table, (4, 4), 1, 8**-0.5)
    assert_near(out, want, TOLERANCE[torch.bfloat16], 'out')
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, table))
    assert all(x.dtype == torch.float32 for x in grads)


@pytest.mark.parametrize('impl', ['auto', 'eager', 'chunked'])
def test_inference_mode_leaves_inputs_alone(impl):
    q, k, v, table = sample(2, 2, (3, 3), 0, 8, 2, torch.float32)
    before = [x.clone() for x in (q, k, v, table)]
    want = spatial_prior_attention(q, k, v, table, (3, 3), attn_impl=impl)
    with torch.inference_mode():
        out = spatial_prior_attention(q, k, v, table, (3, 3), attn_impl=impl)
    torch.testing.assert_close(out, want.detach())
    for x, y in zip((q, k, v, table), before, strict=True):
        assert torch.equal(x, y)


class _Layer(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.table = torch.nn.Parameter(1 + torch.randn(2, 5, 7) / 3)
        self.impl = impl

    def forward(self, q):
        return spatial_prior_attention(
            q,
            2 * q,
            q + 1,
            self.table,
            (3, 4),
            num_extra_tokens=1,
            attn_impl=self.impl,
        )


@pytest.mark.parametrize('impl', ['auto', 'chunked'])
def test_traces_count_the_same_products_and_keep_the_batch_free(impl, recwarn):
    layer, q = _Layer(impl), torch.randn(2, 2, 13, 16)
    traced = torch.jit.trace(layer, q)
    products = str(traced.inlined_graph).count('aten::matmul')
    assert products == 2
    wider = torch.cat([q, q, q])
    torch.testing.assert_close(traced(wider), layer(wider))
    assert not [x for x in recwarn if x.category is torch.jit.TracerWarning]


@pytest.mark.parametrize('impl', ['auto', 'chunked'])
def test_compiles_as_one_graph_and_once_per_shape(impl):
    import torch._dynamo.testing

    torch._dynamo.reset()
    layer, q = _Layer(impl), torch.randn(2, 2, 13, 16)
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        x, y = q.clone().requires_grad_(), q.clone().requires_grad_()
        compiled(x).square().sum().backward()
        got, layer.table.grad = layer.table.grad, None
        layer(y).square().sum().backward()
        want, layer.table.grad = layer.table.grad, None
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(q), layer(q))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_exports_with_a_free_batch():
    layer, q = _Layer('auto').eval(), torch.randn(2, 2, 13, 16)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(layer, (q,), dynamic_shapes=({0: batch},))
    wider = torch.cat([q, q, q])
    call = program.module() if hasattr(program, 'module') else program
    torch.testing.assert_close(call(wider), layer(wider))


# --- memory


def saved_and_peak_elements(hw):
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

    q, k, v, table = sample(1, 2, hw, 0, 8, 2, torch.float32)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = spatial_prior_attention(q, k, v, table, hw, attn_impl='chunked')
        torch.autograd.grad(out.sum(), (q, k, v, table))
    return sum(saved), seen.size


def test_chunked_memory_grows_with_the_tokens_not_their_square(small_blocks):
    saved, largest = zip(
        *(saved_and_peak_elements(x) for x in ((8, 8), (16, 16), (32, 32))), strict=True
    )
    # Four times the tokens: what is saved grows by 4, the largest buffer (blocks of
    # one grid row, and the strip) by 8; all pairs would grow by 16.
    for i in (0, 1):
        assert saved[i + 1] <= 4.2 * saved[i]
        assert largest[i + 1] <= 8.5 * largest[i]
    assert largest[2] < 2 * 1024**2 / 4


# --- FlexAttention


@needs_flex
@settings(max_examples=10, deadline=None)
@given(case=cases)
def test_flex_uncompiled_follows_the_formula(case):
    table_heads = 1 if case['shared'] else case['heads']
    q, k, v, table = sample(
        case['batch'],
        case['heads'],
        case['hw'],
        case['extra'],
        8,
        table_heads,
        torch.float32,
        case['seed'],
    )
    formula = (q, k, v, table, case['hw'], case['extra'], 8**-0.5)
    # On the CPU FlexAttention differentiates with respect to the table alone, and
    # only uncompiled.
    q, k, v = (x.detach() for x in (q, k, v))
    out = flex_attention_uncompiled(q, k, v, table, case['hw'], 8**-0.5, case['extra'])
    assert_near(out, naive_attention(*formula), TOLERANCE[torch.float32], 'out')
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(out, table, grad)
    want = naive_gradients(*formula, grad)
    size = max(x.abs().max().item() for x in want)
    assert (got.double() - want[3]).abs().max() <= 1e-4 * size


@needs_flex
@pytest.mark.slow
def test_flex_compiled_on_the_cpu():
    q, k, v, table = sample(1, 2, (8, 8), 1, 16, 2, torch.float32)
    with torch.no_grad():
        out = spatial_prior_attention(
            q, k, v, table, (8, 8), num_extra_tokens=1, attn_impl='flex'
        )
    want = naive_attention(q, k, v, table, (8, 8), 1, 0.25)
    assert_near(out, want, TOLERANCE[torch.float32], 'out')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('impl', ['eager', 'chunked', 'flex', 'auto'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernels_on_cuda(impl, dtype):
    leaves = sample(2, 2, (8, 12), 1, 16, 2, dtype)
    moved = [x.detach().cuda().requires_grad_() for x in leaves]
    out = spatial_prior_attention(*moved, (8, 12), num_extra_tokens=1, attn_impl=impl)
    want = naive_attention(*leaves, (8, 12), 1, 0.25)
    # TF32 is off by default; FlexAttention's float32 products may still use it.
    tolerance = 4e-2 if dtype == torch.bfloat16 else 2e-3
    assert_near(out.cpu(), want, tolerance, 'out')
    grad = torch.ones_like(out)
    got = torch.autograd.grad(out, moved, grad)
    want = naive_gradients(*leaves, (8, 12), 1, 0.25, grad.cpu())
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


@pytest.fixture
def auto_takes_flex(monkeypatch):
    """As on CUDA; a backend of torch.compile that needs no compiler stands in."""

    def install(backend):
        compiled = torch.compile(
            flex_attention_uncompiled, backend=backend, dynamic=False
        )
        monkeypatch.setattr(flex_module, '_compiled', lambda: compiled)

    torch._dynamo.reset()
    monkeypatch.setattr(attention_module, '_choose', lambda *_: 'flex')
    monkeypatch.setattr(flex_module, '_tried', set())
    monkeypatch.setattr(flex_module, '_failed', set())
    return install


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError('no kernel')


def no_kernel(graph, inputs):
    raise RuntimeError('no kernel\nand a long story')


def no_backward_kernel(graph, inputs):
    return lambda *args: tuple(map(FailsBackward.apply, graph.forward(*args)))


@needs_flex
@pytest.mark.parametrize('needs_grad', [False, True])
def test_auto_falls_back_where_flex_does_not_compile(auto_takes_flex, needs_grad):
    auto_takes_flex(no_backward_kernel if needs_grad else no_kernel)
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    table = torch.randn(2, 3, 5, requires_grad=needs_grad)
    expected = spatial_prior_attention(q, k, v, table, (2, 3), attn_impl='eager')
    with pytest.warns(RuntimeWarning, match='does not run here') as caught:
        out = spatial_prior_attention(q, k, v, table, (2, 3))
    assert len(caught) == 1
    torch.testing.assert_close(out, expected)
    if needs_grad:
        grads = [
            torch.autograd.grad(x.square().sum(), table)[0] for x in (out, expected)
        ]
        torch.testing.assert_close(*grads)
    # told once, with other shapes too
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        spatial_prior_attention(q[:1], k[:1], v[:1], table, (2, 3))


@needs_flex
def test_auto_takes_flex_where_it_works(auto_takes_flex):
    graphs = []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph.forward

    auto_takes_flex(counts)
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    table = torch.randn(2, 3, 5)
    expected = spatial_prior_attention(q, k, v, table, (2, 3), attn_impl='eager')
    for _ in range(3):
        out = spatial_prior_attention(q, k, v, table, (2, 3))
        torch.testing.assert_close(out, expected)
    assert len(graphs) == 1  # a kernel for a shape, made once
    out = spatial_prior_attention(q[:1], k[:1], v[:1], table, (2, 3))
    torch.testing.assert_close(out, expected[:1])
    assert len(graphs) == 2


@needs_flex
def test_running_out_of_memory_is_not_flex_to_blame(auto_takes_flex):
    def full(*inputs):
        raise torch.cuda.OutOfMemoryError('full')

    auto_takes_flex(lambda graph, inputs: full)
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        spatial_prior_attention(q, k, v, torch.randn(2, 3, 5), (2, 3))


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
