import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
import torch

from spvit_mm.explain import (
    collect_priors,
    draw_comparison,
    draw_priors,
    draw_strip,
    format_focus,
    head_focus,
)
from spvit_mm.models import SPViT

ARCH = dict(embed_dims=8, num_layers=4, num_heads=2, feedforward_channels=8)


def build(**kwargs):
    return SPViT(ARCH, img_size=(24, 40), patch_size=8, **kwargs)


def lookhere(**attn_cfg):
    prior = dict(type='LookHereSpatialPrior', views=('right', 'all'))
    return build(attn_cfg=attn_cfg, prior=prior)


def drawn(figure):
    """The axes with a map, without the colour bar."""
    return [ax for ax in figure.axes if ax.images and ax.get_label() != '<colorbar>']


def words(figure):
    """All that is written in a figure."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


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


def test_position_that_is_no_prior_is_named():
    model = build(attn_cfg=dict(type='RotaryPositionAttention'))
    with pytest.raises(ValueError, match='comes from RotaryPositionAttention, which'):
        collect_priors(model)


@pytest.mark.parametrize('share', ['none', 'heads', 'network'])
def test_the_two_priors_of_a_layer_have_names_of_their_own(share):
    model = build(attn_cfg=dict(combine='both'), share_prior=share)
    owner = model if share == 'network' else model.layers[0].attn
    torch.nn.init.normal_(owner.bias_prior.w2)
    maps = collect_priors(model)
    layer = 'all layers' if share == 'network' else 'layer 1'
    assert [m.name for m in maps][:2] == [f'{layer}, multiplied', f'{layer}, added']
    assert [m.added for m in maps] == [False, True] * (len(maps) // 2)
    assert (maps[0].table == 1).all()
    expected = owner.bias_prior((3, 5)).detach().numpy()
    np.testing.assert_array_equal(maps[1].table, expected)
    assert f'{layer}, added' in format_focus(head_focus(maps))


@pytest.mark.parametrize('share', ['none', 'network'])
def test_an_added_prior_keeps_the_name_of_its_layer(share):
    model = build(attn_cfg=dict(combine='add', strength=2.0), share_prior=share)
    maps = collect_priors(model)
    assert maps[0].name == ('all layers' if share == 'network' else 'layer 1')
    assert all(m.added for m in maps)
    assert (maps[0].table == 1).all(), 'neutral is 1, whatever the strength'
    assert not any(m.added for m in collect_priors(build()))


@pytest.mark.parametrize('deploy', [False, True])
def test_masked_offsets_are_nan(deploy):
    model = lookhere(combine='add')
    if deploy:
        model.switch_to_deploy()
    first, _ = collect_priors(model)
    # The first head looks to the right within 45 degrees, the other all around.
    x, y = np.meshgrid(np.arange(-4, 5), np.arange(-2, 3))
    np.testing.assert_array_equal(~np.isnan(first.table[0]), abs(y) <= x)
    np.testing.assert_allclose(first.table[1], 1 - 0.75 * np.hypot(x, y), rtol=1e-6)


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


def test_picture_says_what_is_added_and_what_is_masked():
    maps = collect_priors(lookhere(combine='add'))
    for figure in (draw_priors(maps), draw_strip({'a': maps, 'b': maps})):
        assert 'prior, added to the scores\n(1 = neutral)' in words(figure)
        assert any(text.endswith('; grey: masked') for text in words(figure))
        first = drawn(figure)[0]
        low, high = first.images[0].get_clim()
        assert (low + high) / 2 == pytest.approx(1)
        farthest = 1 - 0.75 * np.hypot(4, 2)
        assert low == pytest.approx(farthest, rel=1e-5)
        # What is masked is not painted, and behind it the axes are grey.
        painted = figure_colours(figure, first)
        np.testing.assert_array_equal(painted[2, :4], [[191] * 3] * 4)
        assert painted[2, 4].tolist() != [191] * 3
    plain = words(draw_priors(collect_priors(build())))
    assert 'prior (1 = neutral)' in plain
    assert not any('masked' in text or 'added' in text for text in plain)


def figure_colours(figure, ax):
    """The colours in the picture at the centre of each entry of a map, (rows, columns,
    3)."""
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    rows, columns = ax.images[0].get_array().shape
    y, x = np.mgrid[: rows + 0.0, : columns + 0.0]
    places = np.stack((x - columns // 2 + 0.2, y - rows // 2 + 0.2), axis=-1)
    place = ax.transData.transform(places.reshape(-1, 2)).astype(int)
    colours = picture[picture.shape[0] - 1 - place[:, 1], place[:, 0]]
    return colours.reshape(rows, columns, 3)


def test_rows_of_both_priors_beside_a_model_of_one():
    both = collect_priors(build(attn_cfg=dict(combine='both')))
    product = collect_priors(build())
    figure = draw_comparison({'both': both, 'product': product})
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert labels[:4] == [
        'layer 1\nmultiplied',
        'layer 1\nadded',
        'layer 2\nmultiplied',
        'layer 2\nadded',
    ]
    # Two heads of each model where it multiplies, of the first alone where it adds.
    assert len(drawn(figure)) == 2 * (2 + 2) + 2 * 2
    summed = collect_priors(build(attn_cfg=dict(combine='add')))
    figure = draw_comparison({'product': product, 'sum': summed})
    assert {'product\n', 'sum (added)\n'} <= set(words(figure))
    assert len(drawn(figure)) == 8
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert labels[:2] == ['layer 1', 'layer 2']
