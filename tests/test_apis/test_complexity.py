import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.nn import functional as F

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


ARCH = dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=48)
# One layer's MLP prior takes two products over the offsets of a grid of 4 x 6.
PRIOR = 3 * 32 * (7 * 11) * (3 + 1)
LOOKHERE = dict(type='LookHereSpatialPrior', views=('right', 'down', 'all'))


def count(**kwargs):
    model = SPViT(ARCH, img_size=(32, 48), patch_size=8, cls_token_layer=0, **kwargs)
    info = get_model_complexity_info(
        model.eval(), (3, 32, 48), show_arch=False, show_table=False
    )
    return info['flops']


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize(
    ('combine', 'priors', 'kernels'),
    [
        ('multiply', 1, ('eager', 'chunked', 'auto')),
        ('add', 1, ('eager', 'chunked', 'sdpa', 'auto')),
        ('both', 2, ('eager', 'chunked', 'auto')),
    ],
)
def test_every_form_and_kernel_counts_alike(grad, combine, priors, kernels):
    """Attention products: 2 N N C multiply-adds a layer, spatial or vanilla."""

    def by_kernel(impl):
        attn_cfg = dict(combine=combine, attn_impl=impl)
        return count(num_spsa_layers=3, attn_cfg=attn_cfg)

    with torch.set_grad_enabled(grad):
        flops = {impl: by_kernel(impl) for impl in kernels}
        plain = count(num_spsa_layers=0)
    # The priors' own products, and nothing else, come on top.
    assert flops == dict.fromkeys(kernels, plain + 3 * priors * PRIOR)


@pytest.mark.parametrize(
    ('kwargs', 'products'),
    [
        *(
            (dict(attn_cfg=dict(type='RotaryPositionAttention', mode=mode)), 0)
            for mode in ('axial', 'mixed', 'normalized')
        ),
        (dict(attn_cfg=dict(combine='add'), prior=dict(type='ALiBiSpatialPrior')), 0),
        (dict(attn_cfg=dict(combine='add'), prior=dict(type='KERPLESpatialPrior')), 0),
        # The direction of each head with each offset.
        (dict(attn_cfg=dict(combine='add'), prior=LOOKHERE), 3 * 2 * (7 * 11)),
    ],
)
def test_fixed_positions_cost_no_more_than_their_own_products(kwargs, products):
    plain = count(num_spsa_layers=0)
    assert count(num_spsa_layers=3, **kwargs) == plain + 3 * products
