import copy
import inspect
import pickle

import pytest
import torch
import torch.nn as nn
from mmengine.runner import load_checkpoint

from spvit_mm import models
from spvit_mm.models import ConstantSpatialPrior, LookHereSpatialPrior, SpatialPrior

from .test_spvit import WHOLE_GRAPH, build, randomize

PRIORS = [
    cls
    for cls in vars(models).values()
    if inspect.isclass(cls)
    and issubclass(cls, SpatialPrior)
    and cls not in (SpatialPrior, ConstantSpatialPrior)
]


class Decay(SpatialPrior):
    """A prior of somebody else, without parameters."""

    def relation(self, offsets):
        return torch.exp(-offsets.norm(dim=-1)).expand(self.num_heads, -1)


def trained(**kwargs):
    return randomize(build(**kwargs)).eval()


CASES = [
    dict(),
    dict(share_prior='heads', with_peg=True, stem='conv'),
    dict(share_prior='network', num_spsa_layers=4, cls_token_layer=0),
    dict(img_size=(16, 40)),
    dict(prior=dict(type='MLPSpatialPrior', coords='scaled')),
    dict(prior=dict(type=Decay)),
    dict(num_spsa_layers=0),
    *(
        dict(
            prior=dict(type=p),
            attn_cfg=dict(combine='add' if p.is_bias else 'multiply'),
        )
        for p in PRIORS
        if p is not LookHereSpatialPrior
    ),
    dict(
        prior=dict(type='LookHereSpatialPrior', views=('left', 'all', 'right-down')),
        attn_cfg=dict(combine='add'),
    ),
    dict(attn_cfg=dict(combine='add', strength=2.0)),
    dict(attn_cfg=dict(combine='both', init_score=1.0), qkv_bias=False),
    dict(attn_cfg=dict(combine='both'), share_prior='network'),
]


@pytest.mark.parametrize('kwargs', CASES)
@pytest.mark.parametrize('grid', [None, (3, 6)])
@torch.no_grad()
def test_same_outputs_and_a_strict_round_trip(kwargs, grid):
    model = trained(**kwargs)
    size = [8 * side for side in grid or model.patch_resolution]
    x = torch.randn(2, 3, *size)
    expected = model(x)[0]
    spatial = [n for n, _ in model.named_parameters() if 'prior.' in n]
    others = [n for n, _ in model.named_parameters() if n not in spatial]

    model.switch_to_deploy(grid)
    assert torch.equal(model(x)[0], expected)
    assert [n for n, _ in model.named_parameters()] == others
    for prior in model.modules():
        if isinstance(prior, SpatialPrior):
            assert type(prior) is ConstantSpatialPrior

    # built for the training's grid; the checkpoint brings the one it was made for
    loaded = build(**kwargs, deploy=True).eval()
    assert loaded.deploy
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loaded(x)[0], expected)


def test_layers_go_on_sharing_one_prior():
    model = trained(share_prior='network')
    model.layers[1].attn.prior = model.layers[0].attn.prior = model.prior
    model.switch_to_deploy()
    assert model.prior is model.layers[0].attn.prior is model.layers[1].attn.prior


def test_switching_again_changes_nothing():
    model = trained()
    model.switch_to_deploy((3, 6))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prior = model.layers[0].attn.prior
    model.switch_to_deploy()
    model.switch_to_deploy((3, 6))
    assert model.layers[0].attn.prior is prior
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r'is \(4, 4\), but .* for \(3, 6\)'):
        model.switch_to_deploy((4, 4))
    assert prior.grid == (3, 6)


@pytest.mark.parametrize('grid', [(4,), (4, 0), 4, (4.0, 4), '44'])
def test_a_grid_that_is_none_is_refused(grid):
    model = trained()
    with pytest.raises(ValueError, match='`grid` must be two positive integers'):
        model.switch_to_deploy(grid)
    assert not model.deploy


def test_another_grid_is_refused_with_both_named():
    model = trained()
    model.switch_to_deploy()
    with pytest.raises(ValueError, match='5 x 3 patches.*for 4 x 4.*--grid 5 3'):
        model(torch.randn(1, 3, 40, 24))


def test_checkpoints_of_the_other_form_are_refused(tmp_path):
    model = trained()
    state = model.state_dict()
    torch.save({'state_dict': state}, tmp_path / 'trained.pth')
    switched = copy.deepcopy(model)
    switched.switch_to_deploy()
    before = copy.deepcopy(switched.state_dict())
    with pytest.raises(ValueError, match="'layers.0.attn.prior'.*reparameterize"):
        load_checkpoint(switched, str(tmp_path / 'trained.pth'))
    for name in before:
        if 'prior' in name:
            assert torch.equal(switched.state_dict()[name], before[name])
    torch.save({'state_dict': before}, tmp_path / 'deployed.pth')
    with pytest.raises(ValueError, match="'layers.0.attn.prior'.*deploy=True"):
        load_checkpoint(model, str(tmp_path / 'deployed.pth'))


def test_a_table_of_other_heads_is_a_mismatch():
    model = trained(share_prior='heads')
    model.switch_to_deploy()
    other = build(deploy=True)
    with pytest.raises(RuntimeError, match='size mismatch.*prior.omega'):
        other.load_state_dict(model.state_dict())


def test_copies_pickles_and_compiles():
    model = trained(share_prior='network')
    model.switch_to_deploy((4, 5))
    x = torch.randn(2, 3, 32, 40)
    expected = model(x)[0]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x)[0], expected)
        clone.switch_to_deploy((4, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=WHOLE_GRAPH)
    torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match='for 4 x 5'):
        compiled(torch.randn(2, 3, 32, 32))


def test_training_a_deployed_model_leaves_its_priors_alone():
    model = trained()
    model.switch_to_deploy()
    model.train()
    before = model.layers[0].attn.prior.omega.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    model.init_weights()
    assert torch.equal(model.layers[0].attn.prior.omega, before)


def test_switching_keeps_dtype_device_and_mode():
    model = trained().double().train()
    with torch.inference_mode():
        model.switch_to_deploy()
    prior = model.layers[0].attn.prior
    assert prior.omega.dtype == torch.float64
    assert prior.training
    assert not prior.omega.is_inference()
    model(torch.randn(1, 3, 32, 32).double())[0].sum().backward()
    low = trained().to(torch.bfloat16)
    low.switch_to_deploy()
    prior = low.layers[0].attn.prior
    assert prior.omega.dtype == prior((4, 4)).dtype == torch.float32
    # what has no parameters follows the model
    model = build(prior=dict(type=Decay)).to('meta')
    model.switch_to_deploy()
    assert model.layers[0].attn.prior.omega.device.type == 'meta'


def test_deploy_form_without_checkpoint_is_neutral():
    model = build(deploy=True)
    model.init_weights()
    omega = model.layers[0].attn.prior.omega
    assert torch.equal(omega, torch.ones(3, 7, 7))
    assert isinstance(omega, torch.Tensor)
    assert not isinstance(omega, nn.Parameter)
