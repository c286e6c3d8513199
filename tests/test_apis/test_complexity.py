import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.nn import functional as F

from spvit_mm.apis import register_flop_counter
from spvit_mm.models import SPViT


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, q, k, v):
        q = q * self.weight
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.matmul(torch.matmul(q, k.transpose(-2, -1)).softmax(-1), v)


@pytest.mark.parametrize(
    'shapes',
    [
        ((3, 7, 4), (3, 7, 4), (3, 7, 4)),
        ((2, 7, 4), (2, 9, 4), (2, 9, 5)),
    ],
)
def test_products_count_alike(shapes):
    counts = [
        get_model_complexity_info(Attention(fused), shapes, show_arch=False)['flops']
        for fused in (True, False)
    ]
    (h, n, d), (_, m, _), (_, _, dv) = shapes
    assert counts == [h * n * m * (d + dv)] * 2


def test_a_counter_that_is_there_stays():
    register_flop_counter('aten::scaled_dot_product_attention', lambda *_: 1)
    shape = ((1, 2, 3),) * 3
    info = get_model_complexity_info(Attention(True), shape, show_arch=False)
    assert info['flops'] == 1 * 2 * 2 * 6


@pytest.mark.parametrize('grad', [True, False])
def test_every_kernel_counts_alike(grad):
    """Attention products: 2 N N C multiply-adds a layer, spatial or vanilla."""

    def count(**kwargs):
        arch = dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=48)
        model = SPViT(
            arch, img_size=(32, 48), patch_size=8, cls_token_layer=0, **kwargs
        )
        with torch.set_grad_enabled(grad):
            info = get_model_complexity_info(
                model.eval(), (3, 32, 48), show_arch=False, show_table=False
            )
        return info

    def by_kernel(impl):
        attn_cfg = dict(type='SpatialPriorAttention', attn_impl=impl)
        return count(num_spsa_layers=3, attn_cfg=attn_cfg)['flops']

    flops = {impl: by_kernel(impl) for impl in ('eager', 'chunked', 'auto')}
    assert len(set(flops.values())) == 1, flops
    # The prior takes two products over its offsets, and nothing else comes on top.
    offsets, hidden = 7 * 11, 32
    prior = 3 * (3 * hidden) * offsets * (3 + 1)
    assert flops['auto'] == count(num_spsa_layers=0)['flops'] + prior
