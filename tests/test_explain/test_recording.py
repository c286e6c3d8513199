import numpy as np
import pytest
import torch
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmpretrain.models import VisionTransformer
from mmpretrain.models.utils import MultiheadAttention
from torch import nn

from spvit_mm.explain import (
    attention_terms,
    draw_mean_attention,
    draw_query_attention,
    format_distances,
    mean_attention,
    query_attention,
    record_attention,
)
from spvit_mm.models import GatedPositionalAttention, SPViT

ARCH = dict(embed_dims=16, num_layers=3, num_heads=4, feedforward_channels=16)
ATTENTIONS = [
    dict(type='SpatialPriorAttention'),
    dict(type='GatedPositionalAttention'),
    dict(type='RelativePositionAttention', mode='bias'),
    dict(type='RelativePositionAttention', mode='embedding'),
    dict(type='RotaryPositionAttention', mode='axial'),
    dict(type='RotaryPositionAttention', mode='mixed'),
    dict(type='RotaryPositionAttention', mode='normalized'),
]
VIEWS = ('right', 'up', 'left-down', 'all')
LOOKHERE = dict(type='LookHereSpatialPrior', views=VIEWS)
DIRECTED = dict(LOOKHERE, type='LookHereProduct')
FORMS = {
    'multiply': dict(),
    'add': dict(attn_cfg=dict(combine='add', strength=3.0)),
    'both': dict(attn_cfg=dict(combine='both', strength=0.5)),
    'score': dict(attn_cfg=dict(init_score=2.0), qkv_bias=False),
    'both and score': dict(
        attn_cfg=dict(combine='both', init_score=2.0), qkv_bias=False
    ),
    'alibi': dict(attn_cfg=dict(combine='add'), prior=dict(type='ALiBiSpatialPrior')),
    'lookhere, multiply': dict(prior=DIRECTED),
    'lookhere, add': dict(attn_cfg=dict(combine='add'), prior=LOOKHERE),
    'lookhere, both': dict(attn_cfg=dict(combine='both'), prior=DIRECTED),
}


def build(attn_cfg=None, **kwargs):
    model = SPViT(
        ARCH, img_size=(24, 32), patch_size=8, attn_cfg=attn_cfg,
        num_spsa_layers=2, **kwargs
    )  # fmt: skip
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize('attn_cfg', ATTENTIONS)
@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_same_result_and_weights_that_make_it(attn_cfg, cls_token_layer):
    model = build(attn_cfg, cls_token_layer=cls_token_layer)
    x = torch.randn(2, 3, 24, 32).double()
    expected = model(x)[0]
    with record_attention(model) as recording:
        torch.testing.assert_close(model(x)[0], expected)
        model(x)
        assert len(recording.maps) == 3, 'one forward at a time'
    assert recording.grid == (3, 4)
    for i, m in enumerate(recording.maps):
        length = 13 if i >= cls_token_layer else 12
        assert m.name == f'layers.{i}.attn'
        assert m.weights.shape == (2, 4, length, length)
        torch.testing.assert_close(
            m.weights.sum(-1), torch.ones_like(m.weights[..., 0])
        )
    assert recording.maps[2].kind == 'vanilla'
    assert 'forward' not in vars(model.layers[0].attn)
    assert model.layers[2].attn.scaled_dot_product_attention.__name__ == (
        'scaled_dot_product_attention'
    )
    torch.testing.assert_close(model(x)[0], expected)


@pytest.mark.parametrize('share', ['none', 'network'])
@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_result(form, share):
    model = build(**FORMS[form], share_prior=share, cls_token_layer=1)
    x = torch.randn(2, 3, 24, 32).double()
    expected = model(x)[0]
    with record_attention(model) as recording:
        torch.testing.assert_close(model(x)[0], expected)
    recorded = [m.kind for m in recording.maps]
    kind = 'prior' if 'multiply' in form else 'bias'
    kind = 'both' if 'both' in form or 'score' in form else kind
    assert recorded == [kind, kind, 'vanilla']
    model.switch_to_deploy()
    with record_attention(model) as recording:
        torch.testing.assert_close(model(x)[0], expected)
    assert [m.kind for m in recording.maps] == recorded


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_every_form_is_its_formula(form, cls_token_layer):
    """softmax(Omega * (S + c) + strength * (Theta - 1) where visible), pair by pair."""
    model = build(**FORMS[form], cls_token_layer=cls_token_layer)
    with record_attention(model) as recording, torch.no_grad():
        model(torch.randn(1, 3, 24, 32).double())
        m, attn = recording.maps[1], model.layers[1].attn
        prior, keep = attn.prior((3, 4)), attn.prior.keep((3, 4))
        added = attn.bias_prior((3, 4)) if attn.combine == 'both' else prior
    expected = m.content.clone()
    extra = expected.shape[-1] - 12
    for head, i, j in np.ndindex(4, 12, 12):
        offset = head, j // 4 - i // 4 + 2, j % 4 - i % 4 + 3
        score = m.content[0, head, i + extra, j + extra]
        if attn.combine != 'add':
            c = 0 if attn.score is None else attn.score[head]
            # less c, since the pairs of the class token have no score of c
            score = prior[offset] * (score + c) - c
        if attn.combine != 'multiply':
            score = score + attn.strength * (added[offset] - 1)
        if keep is not None and not keep[offset]:
            score = torch.tensor(-torch.inf)
            assert m.weights[0, head, i + extra, j + extra] == 0
            assert not m.keep[0, head, i + extra, j + extra]
        expected[0, head, i + extra, j + extra] = score
    torch.testing.assert_close(m.scores, expected)
    torch.testing.assert_close(m.weights, expected.softmax(-1))
    assert (m.keep is None) == (keep is None)


def test_rotary_scores_are_those_of_rotated_queries_and_keys():
    model = build(dict(type='RotaryPositionAttention'), cls_token_layer=0)
    with record_attention(model) as recording, torch.no_grad():
        model(torch.randn(1, 3, 24, 32).double())
        attn = model.layers[0].attn
        tokens = torch.randn(1, 13, 16).double()
        attn(tokens, (3, 4))
        q, k, _ = attn.project_qkv(tokens, (3, 4))
        q, k = attn.rotate(q, k, (3, 4))
    m = recording.maps[-1]
    assert (m.kind, m.position) == ('rotary', None)
    torch.testing.assert_close(m.content, q @ k.transpose(-2, -1) * attn.scale)
    torch.testing.assert_close(m.weights, m.content.softmax(-1))


@pytest.mark.parametrize('share', ['none', 'network'])
def test_rescaled_coordinates_of_a_training_step(share):
    forms = [FORMS[name] for name in ('multiply', 'lookhere, both')]
    forms = [dict(form, share_prior=share) for form in forms]
    if share == 'none':
        forms += [dict(attn_cfg=attn_cfg) for attn_cfg in ATTENTIONS]
    for form in forms:
        model = build(**form, coords_rescale=4.0, coords_jitter=2.0)
        x = torch.randn(2, 3, 24, 32).double()
        plain = model(x)[0]
        model.train()
        torch.manual_seed(0)
        expected = model(x)[0]
        assert (expected - plain).abs().max() > 1e-4, 'the factors change something'
        torch.manual_seed(0)
        with record_attention(model):
            torch.testing.assert_close(model(x)[0], expected)


def test_a_prior_stays_float32_in_a_bfloat16_model():
    model = build(attn_cfg=dict(combine='add', strength=100.0)).bfloat16()
    with record_attention(model) as recording, torch.no_grad():
        out = model(torch.randn(1, 3, 24, 32).bfloat16())[0]
    assert out.dtype == torch.bfloat16
    assert recording.maps[0].weights.dtype == torch.float32


def test_an_attention_of_ones_own_need_not_know_of_rescale():
    class Own(GatedPositionalAttention):
        pass

    @attention_terms.register(Own)
    def _(module, q, content, hw, omega):
        return None, 'vanilla', content, content.softmax(-1)

    own = Own(16, 4).double()
    with record_attention(own) as recording:
        own(torch.randn(1, 12, 16).double(), (3, 4))
    assert [m.kind for m in recording.maps] == ['vanilla']


@pytest.mark.parametrize('share', ['none', 'heads', 'network'])
def test_prior_times_content_are_the_scores(share):
    model = build(share_prior=share)
    with record_attention(model) as recording:
        model(torch.randn(1, 3, 24, 32).double())
    m = recording.maps[1]
    prior = model.prior if share == 'network' else model.layers[1].attn.prior
    torch.testing.assert_close(m.position[0], prior.expand((3, 4)).expand(4, -1, -1))
    torch.testing.assert_close((m.position * m.content).softmax(-1), m.weights)


def test_plain_vision_transformer():
    model = VisionTransformer(ARCH, img_size=24, patch_size=8)
    model.eval()
    x = torch.randn(1, 3, 24, 24)
    expected = model(x)[0]
    with record_attention(model) as recording:
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
    assert [m.kind for m in recording.maps] == ['vanilla'] * 3
    assert recording.grid == (3, 3)


def test_the_model_is_restored_after_an_error():
    model = build()
    with pytest.raises(RuntimeError, match='stop'), record_attention(model):
        raise RuntimeError('stop')
    assert 'forward' not in vars(model.layers[0].attn)


def test_a_model_without_attention_is_refused():
    with (
        pytest.raises(ValueError, match='no attention to record'),
        record_attention(nn.Linear(1, 1)),
    ):
        pass


def test_query_attention_leaves_a_model_in_training_as_it_is():
    model = build(stem='conv', coords_rescale=3.0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, 3, 24, 32).double()
    first, second = (query_attention(model, x, (2, 1))[0].weights for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_query_attention_reads_the_rows_of_its_patch():
    model = build(cls_token_layer=2)
    x = torch.randn(1, 3, 24, 32).double()
    layers = query_attention(model, x, (2, 1))
    with record_attention(model) as recording:
        model(x)
    for layer, m, extra in zip(layers, recording.maps, (0, 0, 1), strict=True):
        row = m.weights[0, :, extra + 2 * 4 + 1, extra:].detach().numpy()
        assert layer.weights.shape == (4, 3, 4)
        assert layer.weights.reshape(4, -1) == pytest.approx(row, rel=1e-5)
    assert layers[0].scores == pytest.approx(
        layers[0].content * layers[0].position, rel=1e-5, abs=1e-6
    )
    assert layers[2].position is None
    with pytest.raises(ValueError, match=r'row in 0\.\.2 and a column in 0\.\.3'):
        query_attention(model, x, (3, 0))


@pytest.mark.parametrize(
    ('form', 'rows'),
    [
        ('multiply', ['content score', 'prior', 'product', 'attention']),
        ('lookhere, add', ['content score', 'bias', 'sum', 'attention']),
        (
            'lookhere, both',
            ['content score', 'prior', 'bias', 'product + bias', 'attention'],
        ),
        ('rotary', ['rotated score', 'attention']),
    ],
)
def test_picture_of_a_patch_has_a_row_for_each_term(form, rows):
    rotary = dict(attn_cfg=dict(type='RotaryPositionAttention'))
    model = build(**FORMS.get(form, rotary), cls_token_layer=0)
    x = torch.randn(1, 3, 24, 32).double()
    layer = query_attention(model, x, (1, 2))[0]
    figure = draw_query_attention(layer, (1, 2))
    maps = [ax for ax in figure.axes if ax.images and ax.get_label() != '<colorbar>']
    assert [ax.get_ylabel() for ax in maps[::4]] == rows
    for name, ax in zip(rows, maps[::4], strict=True):
        drawn = ax.images[0].get_array()
        # The first head of LookHere looks to the right: nothing to the left is drawn.
        hidden = np.ma.getmaskarray(drawn)
        masked = 'lookhere' in form and not name.startswith('content')
        assert hidden[:, :2].all() == masked
        assert not hidden[1, 2:].any()
        low, high = ax.images[0].get_clim()
        assert np.isfinite([low, high]).all()


@pytest.mark.parametrize(
    'kwargs', [*(dict(attn_cfg=cfg) for cfg in ATTENTIONS), *FORMS.values()]
)
@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_mean_attention_is_that_of_all_pairs(kwargs, cls_token_layer):
    model = build(**kwargs, cls_token_layer=cls_token_layer)
    images = torch.randn(3, 3, 24, 32).double()
    layers = mean_attention(model, [images[:2], images[2:]])
    with record_attention(model) as recording:
        model(images)
    assert [x.layer for x in layers] == ['layer 1', 'layer 2', 'layer 3']
    assert [x.kind for x in layers] == [m.kind for m in recording.maps]
    for layer, m in zip(layers, recording.maps, strict=True):
        weights = m.weights.detach()[..., -12:, -12:]
        weights = weights / weights.sum(-1, keepdim=True)
        found, far = {}, torch.zeros(4)
        for query in range(12):
            for key in range(12):
                down, right = key // 4 - query // 4, key % 4 - query % 4
                pair = weights[..., query, key].mean(0)
                found.setdefault((down, right), []).append(pair)
                far = far + pair * np.hypot(down, right) / 12
        for (down, right), pairs in found.items():
            mean = torch.stack(pairs).mean(0) * 12
            there = layer.table[:, down + 2, right + 3]
            np.testing.assert_allclose(np.nan_to_num(there), mean, atol=1e-12)
        np.testing.assert_allclose(layer.distance, far)
        # What is masked is told from what gets little.
        assert np.isnan(layer.table).any() == (m.keep is not None)
    # One line per layer under two of heads; one axis per head and the colours.
    assert len(format_distances(layers).splitlines()) == 5
    assert len(draw_mean_attention(layers).axes) == 13


def test_an_even_attention_is_1_everywhere():
    model = build()
    for layer in model.layers:
        nn.init.zeros_(layer.attn.qkv.weight)
        nn.init.zeros_(layer.attn.qkv.bias)
    for layer in mean_attention(model, [torch.randn(2, 3, 24, 32).double()]):
        np.testing.assert_allclose(layer.table, 1)
        np.testing.assert_allclose(layer.distance, layer.even)


def test_mean_attention_needs_images_of_one_size():
    images = [torch.rand(1, 3, 24, side).double() for side in (32, 32, 40)]
    with pytest.raises(ValueError, match='make 3 x 4 and 3 x 5 patches'):
        mean_attention(build(), images)
    with pytest.raises(ValueError, match='`batches` holds no image'):
        mean_attention(build(), [])


class Pooled(nn.Module):
    """Two attentions, each on the first tokens alone."""

    def __init__(self, *tokens):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dims=16, kernel_size=8, stride=8)
        self.attentions = nn.ModuleList(MultiheadAttention(16, 4) for _ in tokens)
        self.tokens = tokens

    def forward(self, image):
        x, _ = self.patch_embed(image)
        for attention, tokens in zip(self.attentions, self.tokens, strict=True):
            x = attention(x[:, :tokens])
        return x


@pytest.mark.parametrize('tokens', [(12, 6), (6, 6)])
def test_layers_without_all_patches_are_refused(tokens):
    model, image = Pooled(*tokens), torch.rand(1, 3, 24, 32)
    with pytest.raises(ValueError, match='Pooled does not have one grid'):
        mean_attention(model, [image])
    with pytest.raises(ValueError, match='Pooled does not have one grid'):
        query_attention(model, image, (0, 0))
