"""SP-SA over a part of the offsets: the other pairs are masked before the softmax."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .flex import flex_prior_attention, make_block_mask, why_not_flex
from .prior import check_table, expand_pairs

MASK_IMPLS = ('auto', 'dense', 'block')


def mask_impl(q: Tensor, v: Tensor, needs_grad: bool, dropout_p: float = 0.0) -> str:
    """Which mask 'auto' takes: 'block' where FlexAttention can run on CUDA, whose
    BlockMask skips blocks of masked pairs, else 'dense', which saves nothing."""
    if q.device.type == 'cuda' and why_not_flex(q, v, needs_grad, dropout_p) is None:
        return 'block'
    return 'dense'


def masked_prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    keep: Tensor,
    hw: tuple[int, int],
    *,
    scale: Optional[float] = None,
    num_extra_tokens: int = 0,
    dropout_p: float = 0.0,
    impl: str = 'auto',
    block_mask=None,
) -> Tensor:
    """Attention with a prior over the offsets that are kept.

        out = softmax_j( omega_ij * (q_i k_j * scale)  where kept, else -inf ) v

    Args:
        q (Tensor): Queries ``(B, heads, T, d)``, as in
            :func:`~spvit_mm.ops.spatial_prior_attention`.
        k (Tensor): Keys, like ``q``.
        v (Tensor): Values ``(B, heads, T, d)``.
        prior (Tensor, optional): Table ``(heads or 1, 2H-1, 2W-1)``; None is 1.
        keep (Tensor): Which offsets take part, ``(heads or 1, 2H-1, 2W-1)``,
            bool. The zero offset must, so that no query is left without a key.
            Pairs with extra tokens always take part.
        hw (tuple[int, int]): Rows and columns ``(H, W)`` of the grid.
        scale (float, optional): Factor of the scores. Defaults to ``d ** -0.5``.
        num_extra_tokens (int): Tokens in front of the grid's. Defaults to 0.
        dropout_p (float): Probability of dropping an attention weight.
            Defaults to 0.
        impl (str): 'dense' (all pairs in memory), 'block' (FlexAttention's
            BlockMask) or 'auto', see :func:`mask_impl`. Defaults to 'auto'.
        block_mask (BlockMask, optional): That of :func:`make_block_mask`, to
            make it once only. Defaults to None.

    Returns:
        Tensor: ``(B, heads, T, d)``.

    Raises:
        ValueError: ``keep`` does not fit the grid or leaves out the zero
            offset, or 'block' cannot run with these inputs.
    """
    if impl not in MASK_IMPLS:
        raise ValueError(f'`impl` must be one of {MASK_IMPLS}, but got {impl!r}.')
    check_table(keep, hw, 'keep')
    if keep.dtype != torch.bool or not bool(keep[:, hw[0] - 1, hw[1] - 1].all()):
        raise ValueError(
            '`keep` must be bool and keep the zero offset of every head, or a query '
            'could be left without any key.'
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if prior is None:
        prior = torch.ones((1, *keep.shape[1:]), device=q.device)
    needs_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, prior)
    )
    if impl == 'auto':
        impl = mask_impl(q, v, needs_grad, dropout_p)
    if impl == 'block':
        reason = why_not_flex(q, v, needs_grad, dropout_p)
        if reason:
            raise ValueError(f"impl='block' cannot run here: {reason}. Take 'dense'.")
        if block_mask is None:
            block_mask = make_block_mask(keep, hw, num_extra_tokens)
        # Uncompiled it is slow, and needs no compiler.
        compiled = q.device.type == 'cuda'
        args = (q, k, v, prior, hw, scale, num_extra_tokens)
        return flex_prior_attention(*args, not compiled, block_mask)
    return _dense(q, k, v, prior, keep, hw, scale, num_extra_tokens, dropout_p)


def _dense(q, k, v, prior, keep, hw, scale, num_extra_tokens, dropout_p):
    scores = torch.matmul(q * scale, k.transpose(-2, -1))
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    pad = (num_extra_tokens, 0, num_extra_tokens, 0)
    omega = F.pad(expand_pairs(prior.to(dtype), hw), pad, value=1.0)
    pairs = F.pad(expand_pairs(keep, hw), pad, value=True)
    scores = (scores.to(dtype) * omega).masked_fill(~pairs, float('-inf'))
    attn = F.dropout(scores.softmax(dim=-1), dropout_p)
    return torch.matmul(attn.to(v.dtype), v)
