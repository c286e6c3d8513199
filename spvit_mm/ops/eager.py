"""The kernels with all pairs in memory: plain operations, and torch's own attention."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import compute_dtype
from .prior import expand_pairs


def _all_pairs(
    table: Tensor, hw: tuple[int, int], num_extra_tokens: int, neutral: float
) -> Tensor:
    """A table's value for all pairs of tokens, ``(heads, T, T)``."""
    pairs = expand_pairs(table, hw)
    if num_extra_tokens:
        pairs = F.pad(pairs, (num_extra_tokens, 0, num_extra_tokens, 0), value=neutral)
    return pairs


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
    in_place: bool = False,
) -> Tensor:
    """``softmax(omega * (q k^T * scale) + beta) v``, operation by operation.

    Plain differentiable operations: it can be traced, compiled as one graph,
    exported and differentiated twice. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked, and:

    Args:
        in_place (bool): Write the logits over the scores; only where nothing is
            recorded for a gradient or a trace. Defaults to False.
    """
    # Scaling q costs N * d products where scaling the scores would cost N * N.
    logits = torch.matmul(q * scale, k.transpose(-2, -1))
    compute = compute_dtype(logits.dtype)
    in_place = in_place and logits.dtype == compute
    if prior is not None:
        omega = _all_pairs(prior.to(compute), hw, num_extra_tokens, 1.0)
        logits = logits.mul_(omega) if in_place else logits * omega
    if bias is not None:
        beta = _all_pairs(bias.to(compute), hw, num_extra_tokens, 0.0)
        logits = logits.add_(beta) if in_place else logits + beta
    attn = logits.softmax(dim=-1)
    if dropout_p:
        attn = F.dropout(attn, dropout_p)
    # Under autocast v may still be float32; the product is then cast by autocast.
    return torch.matmul(attn.to(v.dtype), v)


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: None,
    bias: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
) -> Tensor:
    """``softmax(q k^T * scale + beta) v`` by torch's scaled_dot_product_attention.

    Arguments as in :func:`~spvit_mm.ops.spatial_prior_attention`, already checked.
    """
    beta = _all_pairs(bias.to(q.dtype), hw, num_extra_tokens, 0.0)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=beta[None], dropout_p=dropout_p, scale=scale
    )
