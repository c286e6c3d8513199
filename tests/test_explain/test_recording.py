import pytest
import torch
from mmpretrain.models import VisionTransformer
from torch import nn

from spvit_mm.explain import query_attention, record_attention
from spvit_mm.models import SPViT

ARCH = dict(embed_dims=16, num_layers=3, num_heads=4, feedforward_channels=16)
ATTENTIONS = [
    dict(type='SpatialPriorAttention'),
    dict(type='GatedPositionalAttention'),
    dict(type='RelativePositionAttention', mode='bias'),
    dict(type='RelativePositionAttention', mode='embedding'),
]


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
