import matplotlib.image
import numpy as np
import pytest
import torch

from spvit_mm.explain import collect_priors, draw_priors
from spvit_mm.models import SPViT

ARCH = dict(embed_dims=8, num_layers=4, num_heads=2, feedforward_channels=8)


def build(**kwargs):
    return SPViT(ARCH, img_size=(24, 40), patch_size=8, **kwargs)


def test_every_layer_and_head():
    model = build()
    torch.nn.init.normal_(model.layers[1].attn.prior.w2)
    maps = collect_priors(model)
    assert [m.name for m in maps] == ['layer 1', 'layer 2']
    assert maps[0].table.shape == (2, 5, 9)
    assert (maps[0].table == 1).all()
    expected = model.layers[1].attn.prior((3, 5)).detach().numpy()
    np.testing.assert_array_equal(maps[1].table, expected)
    assert collect_priors(model, (2, 2))[0].table.shape == (2, 3, 3)


def test_shared_prior_is_one_row():
    (only,) = collect_priors(build(share_prior='network'))
    assert only.name == 'all layers'
    assert collect_priors(build(share_prior='heads'))[0].table.shape[0] == 1


def test_model_without_priors_is_refused():
    with pytest.raises(ValueError, match='no spatial prior: no SP-SA layer'):
        collect_priors(build(num_spsa_layers=0))


def test_picture_shows_neutral_in_the_middle_of_the_scale(tmp_path):
    model = build()
    torch.nn.init.normal_(model.layers[1].attn.prior.w2)
    figure = draw_priors(collect_priors(model), 'A title')
    maps = [ax.images[0] for ax in figure.axes if ax.images]
    assert len(maps) == 4
    low, high = maps[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)
    assert {m.get_clim() for m in maps} == {(low, high)}
    figure.savefig(tmp_path / 'priors.png')
    assert matplotlib.image.imread(tmp_path / 'priors.png').std() > 0
