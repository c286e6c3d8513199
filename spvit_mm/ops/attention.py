"""One function for attention with a spatial prior, and the choice of its kernel."""

from __future__ import annotations

import warnings
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import chunked_attention
from .compat import is_compiling
from .eager import eager_attention
from .flex import flex_prior_attention, flex_works, why_not_flex
from .prior import check_table

ATTN_IMPLS = ('auto', 'eager', 'chunked', 'flex')


def _traced() -> bool:
    """Whether the operations are being recorded instead of (only) run."""
    return is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()


def _autocast_dtype(device: str) -> Optional[torch.dtype]:
    """The dtype autocast gives to attention on this device; None if it is off."""
    if hasattr(torch, 'get_autocast_dtype'):
        on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None
    if device == 'cpu':  # torch < 2.4
        return (
            torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        )
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def _constants(*sizes) -> tuple[int, ...]:
    """Sizes as integers, in a trace too, which records them as tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return tuple(int(size) for size in sizes)


def _check(q, k, v, prior, hw, extra, dropout_p, attn_impl) -> None:
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(
            f'`attn_impl` must be one of {ATTN_IMPLS}, but got {attn_impl!r}.'
        )
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            '`q`, `k` and `v` must be (B, heads, T, d) alike, but got '
            f'{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}.'
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            '`q`, `k` and `v` must have one floating-point dtype, but got '
            f'{q.dtype}, {k.dtype} and {v.dtype}.'
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f'`dropout_p` must lie in [0, 1], but got {dropout_p}.')
    if extra < 0:
        raise ValueError(f'`num_extra_tokens` must not be negative, but got {extra}.')
    if prior is None:
        return
    height, width = hw
    if q.shape[2] != height * width + extra:
        raise ValueError(
            f'The grid hw=({height}, {width}) with num_extra_tokens={extra} has '
            f'{height * width + extra} tokens, but `q` holds {q.shape[2]} '
            f'(shape {tuple(q.shape)}). Pass the grid that the tokens were cut on.'
        )
    check_table(prior, hw, 'prior')
    if prior.shape[0] not in (1, q.shape[1]):
        raise ValueError(
            f'`prior` must have one head or as many as `q`, {q.shape[1]}, but got '
            f'{prior.shape[0]} (shape {tuple(prior.shape)}).'
        )
    if prior.device != q.device:
        raise ValueError(
            f'`prior` is on {prior.device} and `q` on {q.device}; move one of them.'
        )


def _choose(q: Tensor, v: Tensor, needs_grad: bool, dropout_p: float) -> str:
    """The rule of ``attn_impl='auto'`` by device; see :func:`spatial_prior_attention`."""
    if q.device.type == 'cpu':
        return 'chunked'
    if q.device.type == 'cuda' and why_not_flex(q, v, needs_grad, dropout_p) is None:
        return 'flex'
    return 'eager'


def spatial_prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    hw: tuple[int, int],
    *,
    scale: Optional[float] = None,
    num_extra_tokens: int = 0,
    dropout_p: float = 0.0,
    attn_impl: str = 'auto',
) -> Tensor:
    """Attention whose scores are multiplied by a prior of the tokens' offsets.

        out = softmax(omega * (q k^T * scale)) v                    (SP-SA)

    Args:
        q (Tensor): Queries ``(B, heads, T, d)`` with ``T = num_extra_tokens +
            H * W``; extra tokens first, then the grid's in row-major order.
        k (Tensor): Keys, like ``q``.
        v (Tensor): Values ``(B, heads, T, d_v)``.
        prior (Tensor, optional): Table ``(heads or 1, 2H-1, 2W-1)`` of the
            prior's value at every offset, laid out as
            :func:`expand_prior` says; one head serves all. It stays in float32
            under autocast. None is vanilla attention, by
            :func:`torch.nn.functional.scaled_dot_product_attention`.
        hw (tuple[int, int]): Rows and columns ``(H, W)`` of the grid.
        scale (float, optional): Factor of the scores. Defaults to ``d ** -0.5``.
        num_extra_tokens (int): Tokens in front that have no position; pairs
            with them have the prior 1. Defaults to 0.
        dropout_p (float): Probability of dropping an attention weight, applied
            as given: pass 0 in evaluation. Defaults to 0.
        attn_impl (str): The kernel. Defaults to 'auto'.

            - 'eager': two matrix products and a softmax over all pairs. Runs
              everywhere, can be traced, exported and differentiated twice.
            - 'chunked': blocks of queries; memory grows as N. Backward by
              recomputation, once. Runs on every device.
            - 'flex': FlexAttention, compiled once per shape; no dropout, no
              float64, torch >= 2.5, and on the CPU no gradients.
            - 'auto': while tracing, compiling or exporting, eager (as chunked
              is then); else on the CPU chunked, whatever the dtype, the number of
              tokens and whether gradients are wanted; on CUDA flex where it can
              run and compiles (tried once for every shape; where it fails, a
              warning says why); and eager in all other cases. On one core in float32, 6 heads
              of 64, batch 1, as multiples of vanilla attention, forward: 196
              tokens 1.7 (eager 2.0), 576 tokens 1.7 (2.4), 1,024 tokens 1.8
              (4.0); forward and backward: 1.7 (1.8), 1.5 (2.1), 1.6 (2.6). ``benchmarks/speed.py --part layer --cpu-time`` prints them.
              The choice on CUDA has not been measured.

    Returns:
        Tensor: ``(B, heads, T, d_v)`` in the dtype of ``q`` (under autocast in
        autocast's). The softmax is taken in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit one another, or the
            kernel cannot take these inputs; the message says what would work.
    """
    traced = _traced()
    head_dim = q.shape[-1]
    if torch.jit.is_tracing():
        # Of one grid, to which the prior belongs; only the batch stays free. (No
        # check: a trace warns of comparisons.)
        *hw, head_dim = _constants(*hw, head_dim)
    else:
        _check(q, k, v, prior, hw, num_extra_tokens, dropout_p, attn_impl)
    if scale is None:
        scale = head_dim**-0.5
    if prior is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    needs_grad = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, prior)
    )
    kernel = attn_impl
    if kernel == 'auto':
        kernel = 'eager' if traced else _choose(q, v, needs_grad, dropout_p)
    elif kernel == 'flex':
        reason = why_not_flex(q, v, needs_grad, dropout_p)
        if reason:
            raise ValueError(
                f"attn_impl='flex' cannot run here: {reason}. "
                "attn_impl='eager' and 'chunked' can, and 'auto' chooses."
            )
    if traced and kernel == 'chunked':
        kernel = 'eager'  # a trace of the blocks would be a long graph of a fixed plan
    if kernel != 'eager':
        dtype = _autocast_dtype(q.device.type)
        if dtype is not None and q.dtype != torch.float64:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        args = (q, k, v, prior, hw, scale, num_extra_tokens)
        with torch.autocast(q.device.type, enabled=False):
            if kernel == 'chunked':
                return chunked_attention(*args, dropout_p)
            if attn_impl == 'flex' or flex_works(*args, needs_grad):
                return flex_prior_attention(*args, is_compiling())
    return eager_attention(
        q,
        k,
        v,
        prior,
        hw,
        scale,
        num_extra_tokens,
        dropout_p,
        in_place=not (needs_grad or traced),
    )
