"""A changed parameter shows in the next forward, however it was changed."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage

from spvit_mm.models import LinearSpatialPrior, SpatialPrior

from .test_spvit import build, randomize

SIZE = (1, 3, 32, 40)


@pytest.fixture(params=['none', 'heads', 'network'])
def model(request):
    """A model that has run, in both modes."""
    model = randomize(build(share_prior=request.param))
    model(torch.randn(SIZE))
    model.eval()
    with torch.inference_mode():
        model(torch.randn(SIZE))
    return model


def prior_parameters(model):
    priors = [m for m in model.modules() if isinstance(m, SpatialPrior)]
    return [param for prior in priors for param in prior.parameters()]


def take_a_step(model):
    optimizer = torch.optim.SGD(prior_parameters(model), lr=1.0)
    model(torch.randn(SIZE))[0].square().sum().backward()
    optimizer.step()


def write_to_data(model):
    """Which counts up no version of a tensor."""
    for param in prior_parameters(model):
        param.data.copy_(torch.randn_like(param))


def load_other_weights(model):
    other = copy.deepcopy(model)
    write_to_data(other)
    model.load_state_dict(other.state_dict())


def swap_in_averages(model):
    """As EMAHook does for validation: parameters exchange their data."""
    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model)
    write_to_data(hook.ema_model.module)
    hook._swap_ema_parameters()


@pytest.mark.parametrize(
    'change', [take_a_step, write_to_data, load_other_weights, swap_in_averages]
)
def test_changed_priors_show_in_the_next_forward(model, change):
    x = torch.randn(SIZE)
    with torch.no_grad():
        before = model(x)[0]
    change(model)
    never_ran = build(share_prior=model.share_prior).eval()
    never_ran.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        after = model(x)[0]
        assert not torch.equal(after, before)
        assert torch.equal(after, never_ran(x)[0])


def test_training_follows_inference_mode():
    """What inference mode keeps of a new grid is of use to autograd, too."""
    prior = LinearSpatialPrior(2)
    with torch.inference_mode():
        prior((3, 7))
    prior((3, 7)).sum().backward()
    assert all(param.grad is not None for param in prior.parameters())
