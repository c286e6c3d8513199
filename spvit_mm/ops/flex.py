"""The tables inside FlexAttention, for CUDA.

FlexAttention (``torch.nn.attention.flex_attention``) hands every score to a
function before its softmax and fuses that function into one kernel; ours looks
the prior and the bias up in their tables, so that nothing of N x N is ever in memory
and gradients reach the tables. Blocks of pairs that are not kept are skipped.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import FunctionType
from typing import Optional

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .prior import mask_bias, pair_offsets

try:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:  # torch < 2.5
    create_block_mask = flex_attention = None

# Kernels that are kept, one for each shape. Compiling one takes tens of seconds.
MAX_KERNELS = 32
# What torch.compile builds them with.
BACKEND = 'inductor'


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return False
    return bool(has_triton())


def why_not_flex(
    q: Tensor, v: Tensor, needs_grad: bool, dropout_p: float
) -> Optional[str]:
    """Why FlexAttention cannot take these inputs, or None where it can.

    Args:
        q (Tensor): Queries ``(B, heads, T, d)``.
        v (Tensor): Values ``(B, heads, T, d)``.
        needs_grad (bool): Whether a backward pass may follow.
        dropout_p (float): Attention dropout.

    Returns:
        str | None: One reason, ready to stand in a message.
    """
    device = q.device.type
    if flex_attention is None:
        return f'torch {torch.__version__} has no FlexAttention (2.5 is the first)'
    if device not in ('cuda', 'cpu'):
        return f'FlexAttention runs on cuda (and forward on cpu), not on {device}'
    if dropout_p:
        return f'FlexAttention has no attention dropout, and dropout_p={dropout_p}'
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'FlexAttention takes float32, bfloat16 and float16, not {q.dtype}'
    if device == 'cpu' and needs_grad:
        return 'FlexAttention has no backward pass on the cpu'
    if device == 'cuda' and not _has_triton():
        return 'FlexAttention on cuda needs Triton, which is missing or has no device'
    if device == 'cuda' and (q.shape[-1] < 16 or v.shape[-1] < 16):
        return f'FlexAttention needs 16 channels a head or more, not {q.shape[-1]}'
    return None


def make_score_mod(prior, bias, hw: tuple[int, int], num_extra_tokens: int):
    """The function that multiplies a score with its prior and adds its bias.

    Args:
        prior (Tensor, optional): ``(heads or 1, 2H-1, 2W-1)``; None is 1.
        bias (Tensor, optional): ``(heads or 1, 2H-1, 2W-1)``; None is 0.
        hw (tuple[int, int]): Grid.
        num_extra_tokens (int): Tokens in front of the grid's: prior 1, bias 0.

    Returns:
        Callable: FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)``.
    """

    def look_up(table, h, dy, dx, extra, neutral):
        value = table[h * 0 if table.shape[0] == 1 else h, dy, dx]
        if not num_extra_tokens:
            return value
        return torch.where(extra, torch.full_like(value, neutral), value)

    def score_mod(score, b, h, q_idx, kv_idx):
        pair = pair_offsets(q_idx, kv_idx, hw, num_extra_tokens)
        if prior is not None:
            score = score * look_up(prior, h, *pair, 1.0)
        if bias is not None:
            score = score + look_up(bias, h, *pair, 0.0)
        return score

    return score_mod


def make_block_mask(keep: Tensor, hw: tuple[int, int], num_extra_tokens: int):
    """FlexAttention's BlockMask, for all images, of the pairs that are kept.

    Arguments as in :func:`~spvit_mm.ops.spatial_prior_attention`.
    """
    length = num_extra_tokens + hw[0] * hw[1]
    heads = keep.shape[0]

    def mask_mod(b, h, q_idx, kv_idx):
        dy, dx, extra = pair_offsets(q_idx, kv_idx, hw, num_extra_tokens)
        # The attention asks for its own head also where one mask serves all.
        return keep[h if heads > 1 else h * 0, dy, dx] | extra

    return create_block_mask(
        mask_mod,
        None,
        heads if heads > 1 else None,
        length,
        length,
        device=str(keep.device),
    )


# The masks of the tables in use, which takes all pairs of tokens to make.
_masks = WeakTensorKeyDictionary()


def _kept_mask(keep: Tensor, hw: tuple[int, int], num_extra_tokens: int):
    """The BlockMask of a table, made once until the table is written to."""
    version = None if keep.is_inference() else keep._version
    state = (version, *hw, num_extra_tokens)
    if keep not in _masks or _masks[keep][0] != state:
        # Of a copy, or the mask would keep its own key alive.
        _masks[keep] = state, make_block_mask(keep.clone(), hw, num_extra_tokens)
    return _masks[keep][1]


def flex_attention_uncompiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    block_mask=None,
) -> Tensor:
    """FlexAttention as it is traced; all N x N scores if called so.

    Arguments as in :func:`~spvit_mm.ops.spatial_prior_attention`, and:

    Args:
        block_mask (BlockMask, optional): The pairs that are kept, of
            :func:`make_block_mask`. Defaults to None, all pairs.
    """
    score_mod = make_score_mod(prior, bias, hw, num_extra_tokens)
    return flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale
    )


def _kernel_key(tensors, hw, scale: float, num_extra_tokens: int) -> tuple:
    """All that a compiled kernel depends on."""
    tensors = (
        x if x is None else (x.device, x.dtype, x.shape, x.stride(), x.requires_grad)
        for x in tensors
    )
    return (*hw, scale, num_extra_tokens, torch.is_grad_enabled(), *tensors)


@lru_cache(maxsize=MAX_KERNELS)
def _kernel(key: tuple):
    """A compiled :func:`flex_attention_uncompiled` for one key.

    torch counts what it compiles by code object, and after 8 shapes
    (``torch._dynamo.config.recompile_limit``) runs one uncompiled, all pairs in
    memory. A copy of the code has a count of its own.
    """
    plain = flex_attention_uncompiled
    height, width, *_ = key
    code = plain.__code__.replace(co_name=f'flex_attention_{height}x{width}')
    copy = FunctionType(code, plain.__globals__, code.co_name, plain.__defaults__)
    return torch.compile(copy, dynamic=False, backend=BACKEND)


def flex_prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    keep: Optional[Tensor],
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    compiling: bool,
) -> Tensor:
    """``softmax(omega * (q k^T * scale) + beta, where kept) v`` in one fused kernel.

    Compiled once per shape (tens of seconds) unless the caller is itself being
    compiled. The last :data:`MAX_KERNELS` shapes keep their kernels. Arguments as
    in :func:`~spvit_mm.ops.spatial_prior_attention`, already checked.
    """
    if compiling:
        bias, keep = mask_bias(bias, keep), None  # a BlockMask cannot be traced
    tensors = [q, k, v, *(None if x is None else x.float() for x in (prior, bias))]
    if not torch.is_grad_enabled():
        # On the CPU FlexAttention refuses tensors that require gradients even then.
        tensors = [None if x is None else x.detach() for x in tensors]
    settings = (tuple(hw), scale, num_extra_tokens)
    if compiling:
        return flex_attention_uncompiled(*tensors, *settings)
    mask = None if keep is None else _kept_mask(keep, *settings[::2])
    kernel = _kernel(_kernel_key((*tensors, keep), *settings))
    return kernel(*tensors, *settings, mask)


# Kernels that were tried and work, by key.
_tried: set[tuple] = set()
# Kinds of inputs of which no other shape is tried.
_ended: set[tuple] = set()


def flex_works(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    keep: Optional[Tensor],
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    needs_grad: bool,
) -> bool:
    """Whether FlexAttention compiles and runs, there and back, for these inputs.

    Whether a kernel can be built is known only when it has been: it may ask for more
    shared memory than the device has, or for a compiler that is missing, and its
    backward half is built as late as the backward pass. So the first call with a
    shape runs both with a gradient of zeros; what it compiles serves the calls to come.
    After a failure, or :data:`MAX_KERNELS` shapes, others of that kind of inputs are not
    tried: a warning says so once.

    Arguments as in :func:`flex_prior_attention`, and:

    Args:
        needs_grad (bool): Whether a backward pass may follow.

    Raises:
        torch.cuda.OutOfMemoryError: Where memory is short, the kernel is not at
            fault, and a kernel that takes more would not help.
    """
    inputs = (q, k, v, prior, bias)
    settings = (hw, scale, num_extra_tokens)
    key = (needs_grad, *_kernel_key((*inputs, keep), *settings))
    if key in _tried:
        return True
    kind = (q.device, q.dtype, q.shape[-1], v.shape[-1], needs_grad)
    if kind in _ended:
        return False
    if len(_tried) >= MAX_KERNELS:
        _ended.add(kind)
        _warn(
            f'FlexAttention has been compiled for {len(_tried)} shapes, which is as '
            'many as are kept; others'
        )
        return False
    try:
        trial = [
            x
            if x is None
            else x.detach().requires_grad_(needs_grad and x.requires_grad)
            for x in inputs
        ]
        out = flex_prior_attention(*trial, keep, *settings, False)
        leaves = [x for x in trial if x is not None and x.requires_grad]
        if leaves:
            torch.autograd.grad(out, leaves, torch.zeros_like(out))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise errors of every class
        _ended.add(kind)
        reason = str(error).strip().splitlines() or ['no message']
        _warn(
            f'FlexAttention does not run here for {q.dtype} with {q.shape[-1]} channels '
            f'a head ({type(error).__name__}: {reason[0]}), so these inputs'
        )
        return False
    _tried.add(key)
    return True


def _warn(why: str) -> None:
    warnings.warn(
        f"{why} take another kernel under attn_impl='auto', which needs memory for all "
        "pairs of tokens. attn_impl='chunked' needs less; attn_impl='flex' compiles in "
        'any case.',
        RuntimeWarning,
        stacklevel=4,
    )
