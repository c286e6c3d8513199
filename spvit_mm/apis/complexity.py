"""Attention products in mmengine's count of operations."""

from math import prod

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def attention_flops(inputs, outputs) -> int:
    r"""Count the two products of an attention operator.

    :math:`QK^T` takes B h N M d multiply-adds and :math:`AV` B h N M d_v, for
    queries (B, h, N, d), keys (B, h, M, d) and values (B, h, M, d_v). One
    multiply-add is one FLOP, as everywhere in mmengine, so the count equals that of
    the same attention written as two matrix products. As there, the softmax is not
    counted.

    Args:
        inputs (list[torch._C.Value]): The traced inputs: query, key, value, ....
        outputs (list[torch._C.Value]): The traced outputs.

    Returns:
        int: The number of multiply-adds.
    """
    query, key, value = (get_shape(v) for v in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def baddbmm_flops(inputs, outputs) -> int:
    """Count a batch of matrix products with something added, as in the prior's MLP.

    Args:
        inputs (list[torch._C.Value]): The traced inputs: addend, (b, n, k), (b, k, m).
        outputs (list[torch._C.Value]): The traced outputs.

    Returns:
        int: The number of multiply-adds, b n k m.
    """
    left, right = (get_shape(v) for v in inputs[1:3])
    return prod(left) * right[-1]


# Those that mmengine, or another package, counts already are kept.
for op, counter in {
    'aten::scaled_dot_product_attention': attention_flops,
    'aten::baddbmm': baddbmm_flops,
}.items():
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(op, counter)
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.setdefault(
        op, generic_activation_jit()
    )
