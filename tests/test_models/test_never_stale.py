"""The prior's values follow its parameters, however these were changed."""

import copy
import threading

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage

from spvit_mm.models.priors import base as module

from .test_spvit import WHOLE_GRAPH, build, randomize

SIZE = (1, 3, 32, 40)


def fresh(model):
    """What the prior values must be: those of a prior that never ran before."""
    clone = build(share_prior=model.share_prior, with_peg=True)
    clone.to(next(model.parameters()).dtype).train(model.training)
    clone.load_state_dict(copy.deepcopy(model.state_dict()))
    return clone


@pytest.fixture(params=['none', 'heads', 'network'])
def model(request):
    """A model that has run, in both modes."""
    model = randomize(build(share_prior=request.param, with_peg=True))
    model(torch.randn(SIZE))
    model.eval()
    with torch.inference_mode():
        model(torch.randn(SIZE))
    return model


def priors(model):
    return [m for m in model.modules() if isinstance(m, module.SpatialPrior)]


def change(model, amount=0.5):
    """New parameters of every prior."""
    with torch.no_grad():
        for prior in priors(model):
            for param in prior.parameters():
                param.add_(torch.randn_like(param) * amount)


def check(model, before=None):
    x = torch.randn(SIZE, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        out = model(x)[0]
    assert torch.equal(out, fresh(model)(x)[0])
    for prior in priors(model):
        table = prior((4, 5))
        assert torch.equal(table, copy.deepcopy(prior)((4, 5)))
        if before is not None:
            assert not torch.equal(table, before[prior])


def tables(model):
    return {prior: prior((4, 5)).detach().clone() for prior in priors(model)}


def test_after_an_optimizer_step(model):
    before = tables(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(SIZE))[0].square().sum().backward()
    optimizer.step()
    check(model, before)


def test_after_load_state_dict(model):
    before = tables(model)
    other = copy.deepcopy(model)
    change(other)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        check(model, before)
        change(other)


def test_after_writing_to_data(model):
    """Which counts up no version."""
    before = tables(model)
    for prior in priors(model):
        for param in prior.parameters():
            param.data.copy_(torch.randn_like(param))
    check(model, before)


def test_after_an_ema_swap(model):
    """mmengine's EMAHook exchanges the parameters' data for validation and back."""

    hook = EMAHook()
    hook.src_model = model
    hook.ema_model = ExponentialMovingAverage(model)
    raw = tables(model)
    change(hook.ema_model.module)
    hook._swap_ema_parameters()
    check(model, raw)
    hook._swap_ema_parameters()
    check(model)
    for prior, table in tables(model).items():
        assert torch.equal(table, raw[prior])


def test_after_a_change_of_dtype_and_device(model):
    before = tables(model)
    model.double()
    change(model)
    assert priors(model)[0]((4, 5)).dtype == torch.float64
    check(model)
    model.float()
    check(model, before)
    assert build().to('meta').layers[0].attn.prior((4, 5)).device.type == 'meta'


def test_copies_live_their_own_life(model):
    before = tables(model)
    clone = copy.deepcopy(model)
    change(clone)
    check(clone)
    for prior, table in tables(model).items():
        assert torch.equal(table, before[prior])
    check(model)


def test_in_compiled_graphs(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=WHOLE_GRAPH)
    x = torch.randn(SIZE)
    with torch.no_grad():
        compiled(x)
        change(model)
        out = compiled(x)[0]
        torch.testing.assert_close(out, fresh(model)(x)[0], rtol=1e-4, atol=1e-5)


def test_in_threads_on_several_grids(model):
    grids = [(2, 7), (7, 2), (5, 5), (3, 4)]
    expected = {hw: [p(hw).clone() for p in priors(model)] for hw in grids}
    wrong = []

    def work():
        for hw in grids * 10:
            with torch.inference_mode():
                found = [p(hw) for p in priors(model)]
            if not all(map(torch.equal, found, expected[hw])):
                wrong.append(hw)

    module._cached_offsets.cache_clear()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_training_follows_inference_mode(model):
    module._cached_offsets.cache_clear()
    with torch.inference_mode():
        model(torch.randn(SIZE))
    model.train()
    model(torch.randn(SIZE))[0].sum().backward()
    for prior in priors(model):
        assert all(p.grad is not None for p in prior.parameters())


def test_coordinates_alone_are_kept(model):
    """No tensor that depends on a parameter survives a forward."""
    module._cached_offsets.cache_clear()
    state = [dict(vars(m)) for m in model.modules()]
    model(torch.randn(SIZE))
    for kept, m in zip(state, model.modules(), strict=True):
        assert all(vars(m)[name] is value for name, value in kept.items())
        assert vars(m).keys() == kept.keys()
    assert module._cached_offsets.cache_info().currsize == 1
    first = module.relative_offsets((4, 5))
    assert torch.equal(first, module.relative_offsets((4, 5)))
    assert not first.requires_grad
    # of each grid and device their own
    assert module.relative_offsets((5, 4)).shape == (9, 7, 2)
    assert module.relative_offsets((4, 5), 'meta').device.type == 'meta'
