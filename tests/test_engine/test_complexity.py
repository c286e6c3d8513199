import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.nn import functional as F

from spvit_mm.engine import register_flop_counter


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
