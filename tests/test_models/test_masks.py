"""Masks of single heads, ``SpatialPriorAttention(masked=True)``."""

import pytest
import torch
import torch.nn as nn

from spvit_mm.models import SPViT
from spvit_mm.utils import CheckpointError

HW = (4, 5)
FORMS = {
    'product': dict(),
    'score': dict(attn_cfg=dict(init_score=2.0), qkv_bias=False),
    'sum': dict(attn_cfg=dict(combine='add', strength=2.0)),
    'both': dict(attn_cfg=dict(combine='both')),
    'shared by heads': dict(share_prior='heads'),
    'shared by layers': dict(share_prior='network', cls_token_layer=0),
    'a mask of its own': dict(
        prior=dict(type='LookHereSpatialPrior', views=('right', 'all')),
        attn_cfg=dict(combine='add'),
    ),
}


def build(masked=True, attn_cfg=None, hw=HW, **kwargs):
    model = SPViT(
        dict(embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=8),
        img_size=[8 * side for side in hw], patch_size=8,
        attn_cfg=dict(attn_cfg or {}, masked=masked),
        **{'num_spsa_layers': 2, 'pos_embed': None, **kwargs},
    )  # fmt: skip
    for param in model.parameters():
        nn.init.normal_(param, std=0.4)
    return model.double().eval()


def draw_kept(hw=HW, heads=2):
    kept = torch.rand(heads, 2 * hw[0] - 1, 2 * hw[1] - 1) < 0.4
    kept[:, hw[0] - 1, hw[1] - 1] = True
    return kept


def mask(model, hw=HW):
    for layer in model.layers[:2]:
        layer.attn.set_kept(draw_kept(hw))
    return model


def images(hw=HW, batch=2):
    return torch.randn(batch, 3, 8 * hw[0], 8 * hw[1]).double()


def dense(attn, x, hw, omega=None):
    """The formula, pair by pair."""
    prior, bias, keep = (
        None if t is None else t.expand(2, -1, -1)
        for t in attn.score_tables(hw, x.device, omega)
    )
    (height, width), extra = hw, attn.num_extra_tokens
    q, k, v = attn.project_qkv(x, hw)
    scores = q @ k.transpose(-2, -1) * attn.scale
    middle = [(side + 1) // 2 - 1 for side in attn.kept.shape[1:]]
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = j // width - i // width, j % width - i % width
            at = (slice(None), dy + height - 1, dx + width - 1)
            pair = scores[:, :, extra + i, extra + j]
            if prior is not None:
                pair = pair * prior[at]
            if bias is not None:
                pair = pair + bias[at]
            for head in range(2):
                y, x_ = dy + middle[0], dx + middle[1]
                inside = 0 <= y <= 2 * middle[0] and 0 <= x_ <= 2 * middle[1]
                kept = inside and bool(attn.kept[head, y, x_])
                own = attn.prior.keep(hw) if attn.prior is not None else None
                if own is not None:
                    kept = kept and bool(own.expand(2, -1, -1)[head, at[1], at[2]])
                assert kept == bool(keep[head, at[1], at[2]])
                if not kept:
                    pair[:, head] = -torch.inf
            scores[:, :, extra + i, extra + j] = pair
    return attn.merge_heads(scores.softmax(-1) @ v, v)


def check_layers(model, x):
    """That each masked layer computes the formula within the model."""
    seen = []

    def compare(attn, args, kwargs, out):
        tokens, hw, omega = args
        seen.append((out, dense(attn, tokens, tuple(hw), omega)))

    for layer in model.layers[:2]:
        layer.attn.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(x)
    assert len(seen) == 2
    for out, expected in seen:
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('impl', ['auto', 'local'])
@pytest.mark.parametrize('form', FORMS)
def test_masked_attention_is_the_formula(form, impl):
    kwargs = dict(FORMS[form])
    kwargs['attn_cfg'] = dict(kwargs.get('attn_cfg', {}), attn_impl=impl)
    check_layers(mask(build(**kwargs)), images())


@pytest.mark.parametrize('hw', [(6, 5), (3, 7), (2, 3)])
def test_another_grid_masks_the_same_offsets_and_all_further_ones(hw):
    check_layers(mask(build()), images(hw))


@pytest.mark.parametrize('form', FORMS)
def test_all_offsets_are_kept_at_first(form):
    model, plain = build(**FORMS[form]), build(masked=False, **FORMS[form])
    x = images()
    mask(model).load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(x)[0], plain(x)[0])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('grid', [None, (3, 6)])
@torch.no_grad()
def test_deploy_form(form, grid):
    """Priors folded and heads masked; the checkpoint brings both, and their grid."""
    model = mask(build(**FORMS[form]))
    x = images(grid or HW)
    expected = model(x)[0]
    model.switch_to_deploy(grid)
    assert torch.equal(model(x)[0], expected)
    loaded = build(**FORMS[form], deploy=True)
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loaded(x)[0], expected)


@torch.no_grad()
def test_a_checkpoint_brings_the_grid_of_its_masks():
    model = mask(build())
    other = build(hw=(7, 3))
    other.load_state_dict({**model.state_dict(), 'train_grid': other.train_grid})
    for hw in (HW, (7, 3)):
        x = images(hw)
        torch.testing.assert_close(other(x)[0], model(x)[0])


def test_masks_stay_in_training():
    model = mask(build())
    kept = [layer.attn.kept.clone() for layer in model.layers[:2]]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prior = model.layers[0].attn.prior.w1.clone()
    model.train()(images())[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].attn.prior.w1, prior)
    for layer, before in zip(model.layers, kept, strict=False):
        assert torch.equal(layer.attn.kept, before)


def test_masks_that_do_not_fit_are_named():
    model = mask(build())
    state = model.state_dict()
    for other, words in (
        (dict(masked=False), r'layers \[0, 1\], and this model has them in none'),
        (dict(num_spsa_layers=3), r'has them in \[0, 1, 2\]'),
        (dict(num_spsa_layers=1), r'has them in \[0\]'),
    ):
        with pytest.raises(CheckpointError, match=words):
            build(**other).load_state_dict(state, strict=False)
    for change, words in (
        (lambda kept: kept[:1], r'for 2 heads, but are \(1, 7, 9\)'),
        (lambda kept: kept[:, 1:], r'\(heads, 2H-1, 2W-1\)'),
        (lambda kept: kept.float(), 'must be bool'),
        (torch.zeros_like, 'without any key'),
    ):
        wrong = dict(state)
        wrong['layers.1.attn.kept'] = change(state['layers.1.attn.kept'])
        with pytest.raises(CheckpointError, match=f"'layers.1.attn'.*{words}"):
            build().load_state_dict(wrong)
    with pytest.raises(ValueError, match='needs `grid`'):
        type(model.layers[0].attn)(8, 2, masked=True)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('form', ['product', 'a mask of its own'])
def test_a_trace_takes_any_size(form):
    """Smaller and larger grids than that of the masks, as an export leaves them free."""
    model = mask(build(**FORMS[form]))
    model.free_grid = True
    traced = torch.jit.trace(model, images(HW), check_trace=False)
    for hw in [HW, (3, 4), (2, 9), (6, 3), (1, 8)]:
        x = images(hw)
        torch.testing.assert_close(traced(x), model(x))
