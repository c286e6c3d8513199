"""The reference kernel: two matrix products and a softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import compute_dtype
from .prior import expand_pairs


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
    in_place: bool = False,
) -> Tensor:
    """``softmax(omega * (q k^T * scale)) v`` with all pairs in memory.

    Plain differentiable operations: it can be traced, compiled as one graph,
    exported and differentiated twice. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked, and:

    Args:
        in_place (bool): Write the product with the prior over the scores; only
            where nothing is recorded for a gradient or a trace. Defaults to False.
    """
    # Scaling q costs N * d products where scaling the scores would cost N * N.
    logits = torch.matmul(q * scale, k.transpose(-2, -1))
    compute = compute_dtype(logits.dtype)
    omega = expand_pairs(table.to(compute), hw)
    if num_extra_tokens:
        omega = F.pad(omega, (num_extra_tokens, 0, num_extra_tokens, 0), value=1.0)
    if in_place and logits.dtype == compute:
        logits.mul_(omega)
    else:
        logits = logits * omega
    attn = logits.softmax(dim=-1)
    if dropout_p:
        attn = F.dropout(attn, dropout_p)
    # Under autocast v may still be float32; the product is then cast by autocast.
    return torch.matmul(attn.to(v.dtype), v)
