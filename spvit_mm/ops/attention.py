"""One function for attention with a spatial prior, and the choice of its kernel."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import chunked_attention
from .compat import is_compiling, is_traced
from .eager import eager_attention, sdpa_attention
from .flex import flex_prior_attention, flex_works, why_not_flex
from .local import local_attention, local_cost
from .prior import check_keep, check_table, mask_bias

ATTN_IMPLS = ('auto', 'eager', 'chunked', 'local', 'sdpa', 'flex')
# On the CPU 'auto' lets torch's own attention add the bias of all pairs of tokens up to
# this many bytes, which stay in the cache; beyond, blocks that never write it are faster.
SDPA_BYTES = 1 << 21
# On the CPU 'auto' takes 'local' where it costs up to this part of all pairs.
LOCAL_SHARE = 0.6


def _autocast_dtype(device: str) -> Optional[torch.dtype]:
    """The dtype autocast gives to attention on this device; None if it is off."""
    if device == 'meta':  # on which large models are built, and autocast knows none
        return None
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


def _check(q, k, v, tables, hw, extra, dropout_p, attn_impl) -> None:
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
    if not tables:
        return
    height, width = hw
    if q.shape[2] != height * width + extra:
        raise ValueError(
            f'The grid hw=({height}, {width}) with num_extra_tokens={extra} has '
            f'{height * width + extra} tokens, but `q` holds {q.shape[2]} '
            f'(shape {tuple(q.shape)}). Pass the grid that the tokens were cut on.'
        )
    for name, table in tables.items():
        check_table(table, hw, name)
        if table.shape[0] not in (1, q.shape[1]):
            raise ValueError(
                f'`{name}` must have one head or as many as `q`, {q.shape[1]}, but got '
                f'{table.shape[0]} (shape {tuple(table.shape)}).'
            )
        if table.device != q.device:
            raise ValueError(
                f'`{name}` is on {table.device} and `q` on {q.device}; move one of them.'
            )
    if 'keep' in tables:
        # Looking at the values of another device would wait for it at every call.
        check_keep(
            tables['keep'], hw, values=q.device.type == 'cpu' and not is_traced()
        )


def _choose(q, v, tables, hw, dtype, needs_grad: bool, dropout_p: float) -> str:
    """The rule of ``attn_impl='auto'``; see :func:`spatial_prior_attention`.

    ``dtype`` is that of the scores, autocast's included.
    """
    all_pairs = _choose_all_pairs(tables, dtype)
    if is_traced():
        return all_pairs
    if q.device.type == 'cuda' and why_not_flex(q, v, needs_grad, dropout_p) is None:
        return 'flex'
    if q.device.type != 'cpu':
        return all_pairs
    if 'keep' in tables:
        extra = q.shape[2] - hw[0] * hw[1]
        if local_cost(tables['keep'], hw, extra) <= LOCAL_SHARE:
            return 'local'
    heads = max(table.shape[0] for table in tables.values())
    small = heads * q.shape[2] ** 2 * q.element_size() <= SDPA_BYTES
    # With dropout, or a gradient of the mask, torch computes operation by operation.
    learned = needs_grad and any(table.requires_grad for table in tables.values())
    fused = all_pairs == 'sdpa' and not learned and not dropout_p
    return 'sdpa' if fused and small else 'chunked'


def _choose_all_pairs(tables, dtype: torch.dtype) -> str:
    # torch's own attention has no product, and rounds a bias to the scores' dtype.
    exact = dtype in (torch.float32, torch.float64)
    return 'sdpa' if exact and 'prior' not in tables else 'eager'


def spatial_prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    hw: tuple[int, int],
    *,
    bias: Optional[Tensor] = None,
    keep: Optional[Tensor] = None,
    scale: Optional[float] = None,
    num_extra_tokens: int = 0,
    dropout_p: float = 0.0,
    attn_impl: str = 'auto',
) -> Tensor:
    """Attention whose scores know the offset of their two tokens.

        S   = scale * q k^T
        out = softmax(omega * S + beta, where kept) v

    ``omega`` (a factor, 1 without ``prior``), ``beta`` (a summand, 0 without
    ``bias``) and which pairs are kept depend on the offset of the key from the query
    alone and are given by tables, which :func:`expand_prior` lays out. Pairs with an
    extra token have omega 1 and beta 0 and are always kept. With ``prior`` alone this
    is SP-SA (arXiv 2206.07662).

    Args:
        q (Tensor): Queries ``(B, heads, T, d)`` with ``T = num_extra_tokens +
            H * W``; extra tokens first, then the grid's in row-major order.
        k (Tensor): Keys, like ``q``.
        v (Tensor): Values ``(B, heads, T, d_v)``.
        prior (Tensor, optional): Table ``(heads or 1, 2H-1, 2W-1)`` of the factors;
            one head serves all. It stays in float32 under autocast.
        hw (tuple[int, int]): Rows and columns ``(H, W)`` of the grid.
        bias (Tensor, optional): Table of the summands, of the same shape and kind.
            Defaults to None.
        keep (Tensor, optional): Table of bool, of the same shape; where it is False,
            the score is minus infinity. It must keep the zero offset, so that no query
            is left without a key (not checked off the CPU, where checking would wait
            for the device). Defaults to None, all pairs.
        scale (float, optional): Factor of the scores. Defaults to ``d ** -0.5``.
        num_extra_tokens (int): Tokens in front that have no position. Defaults to 0.
        dropout_p (float): Probability of dropping an attention weight, applied
            as given: pass 0 in evaluation. Defaults to 0.
        attn_impl (str): The kernel. Defaults to 'auto'. Without any table it is
            always :func:`torch.nn.functional.scaled_dot_product_attention`.

            - 'eager': two matrix products and a softmax over all pairs. Runs
              everywhere, can be traced, exported and differentiated twice.
            - 'chunked': blocks of queries; memory grows as N. Backward by
              recomputation, once. Runs on every device; is eager in a trace, compiled
              or exported.
            - 'local': bands or tiles of queries, whichever cost less, each against the
              keys that some kept offset reaches; time and memory grow as N times what
              is kept. Needs ``keep``; otherwise as 'chunked'.
            - 'sdpa': torch's scaled_dot_product_attention with the bias of all pairs
              of tokens as its mask, rounded to the dtype of the queries; no ``prior``.
              Is eager under torch.jit.trace.
            - 'flex': FlexAttention, compiled once per shape; no dropout, no
              float64, torch >= 2.5, and on the CPU no gradients. Blocks of pairs that
              are not kept are skipped.
            - 'auto': on CUDA 'flex' where it can run and compiles (tried once for every
              shape; where it fails, a warning says why). On the CPU 'chunked', but
              'local' where it costs up to ``LOCAL_SHARE`` of all pairs, and
              'sdpa' where it is exact, the bias and the mask need no gradient and take
              up to ``SDPA_BYTES`` for all pairs, and there is no dropout. Elsewhere,
              and traced, compiled or exported, 'sdpa' where it is exact, else 'eager'.
              It is exact without ``prior`` in float32 and float64. The choice on CUDA
              has not been measured.

    Returns:
        Tensor: ``(B, heads, T, d_v)`` in the dtype of ``q`` (under autocast in
        autocast's). The softmax is taken in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit one another, or the
            kernel cannot take these inputs; the message says what would work.
    """
    head_dim = q.shape[-1]
    tables = {'prior': prior, 'bias': bias, 'keep': keep}
    tables = {name: table for name, table in tables.items() if table is not None}
    if torch.jit.is_tracing():
        # No check: a trace warns of comparisons.
        (head_dim,) = _constants(head_dim)
    else:
        _check(q, k, v, tables, hw, num_extra_tokens, dropout_p, attn_impl)
    if scale is None:
        scale = head_dim**-0.5
    autocast = None if q.dtype == torch.float64 else _autocast_dtype(q.device.type)
    dtype = autocast or q.dtype
    if not tables:
        if autocast is not None:  # on the CPU, that of torch 2.1 leaves it alone
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, prior, bias)
    )
    kernel = attn_impl
    if kernel == 'auto':
        kernel = _choose(q, v, tables, hw, dtype, needs_grad, dropout_p)
    elif kernel == 'flex':
        reason = why_not_flex(q, v, needs_grad, dropout_p)
        if reason:
            raise ValueError(
                f"attn_impl='flex' cannot run here: {reason}. "
                "attn_impl='eager' and 'chunked' can, and 'auto' chooses."
            )
    elif kernel == 'local' and keep is None:
        raise ValueError(
            "attn_impl='local' computes what `keep` keeps, but got none. "
            "attn_impl='chunked' computes all pairs, and 'auto' chooses."
        )
    elif kernel == 'sdpa' and prior is not None:
        raise ValueError(
            "attn_impl='sdpa' adds and masks only, but got a `prior` to multiply with. "
            "attn_impl='eager' and 'chunked' can, and 'auto' chooses."
        )
    # A trace of the blocks would be a long graph of a fixed plan; torch 2.1 cannot export
    # its own attention to ONNX with a scale.
    if (kernel in ('chunked', 'local') and is_traced()) or (
        kernel == 'sdpa' and torch.jit.is_tracing()
    ):
        kernel = 'eager'
    grid = (hw, scale, num_extra_tokens)
    if kernel != 'eager' and autocast is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        context = torch.autocast(q.device.type, enabled=False)
    else:
        context = nullcontext()
    with context:
        if kernel == 'flex':
            inputs = (q, k, v, prior, bias, keep, *grid)
            if attn_impl == 'flex' or flex_works(*inputs, needs_grad):
                return flex_prior_attention(*inputs, is_compiling())
            kernel = _choose_all_pairs(tables, dtype)
        if kernel == 'local':
            return local_attention(q, k, v, prior, bias, keep, *grid, dropout_p)
        inputs = (q, k, v, prior, mask_bias(bias, keep), *grid, dropout_p)
        if kernel == 'chunked':
            return chunked_attention(*inputs)
        if kernel == 'sdpa':
            return sdpa_attention(*inputs)
        return eager_attention(*inputs, in_place=not (needs_grad or is_traced()))
