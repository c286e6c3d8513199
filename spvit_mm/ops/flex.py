"""The prior inside FlexAttention, for CUDA.

FlexAttention (``torch.nn.attention.flex_attention``) hands every score to a
function before its softmax and fuses that function into one kernel; ours looks
the prior up in the table, so that nothing of N x N is ever in memory and
gradients reach the table.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor

try:
    from torch.nn.attention.flex_attention import flex_attention
except ImportError:  # torch < 2.5
    flex_attention = None


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


def make_score_mod(table: Tensor, hw: tuple[int, int], num_extra_tokens: int):
    """The function that multiplies a score by the prior of its pair.

    Args:
        table (Tensor): ``(heads or 1, 2H-1, 2W-1)``.
        hw (tuple[int, int]): Grid.
        num_extra_tokens (int): Tokens in front of the grid's, whose prior is 1.

    Returns:
        Callable: FlexAttention's ``score_mod(score, b, h, q_idx, kv_idx)``.
    """
    height, width = hw
    one_head = table.shape[0] == 1

    def score_mod(score, b, h, q_idx, kv_idx):
        # Extra tokens take some valid offset here and are set to 1 below: an
        # index must stay inside the table even where its value is not used.
        i = (q_idx - num_extra_tokens).clamp(min=0)
        j = (kv_idx - num_extra_tokens).clamp(min=0)
        dy = j // width - i // width + height - 1
        dx = j % width - i % width + width - 1
        omega = table[h * 0 if one_head else h, dy, dx]
        if num_extra_tokens:
            extra = (q_idx < num_extra_tokens) | (kv_idx < num_extra_tokens)
            omega = torch.where(extra, torch.ones_like(omega), omega)
        return score * omega

    return score_mod


def flex_attention_uncompiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    block_mask=None,
) -> Tensor:
    """FlexAttention with the prior, as it is traced; all N x N scores if called so.

    Arguments as in :func:`~spvit_mm.ops.spatial_prior_attention`, and:

    Args:
        block_mask (BlockMask, optional): Pairs that take part, for priors that
            hold exact zeros in whole blocks. Defaults to None, all pairs.
    """
    score_mod = make_score_mod(table, hw, num_extra_tokens)
    return flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale
    )


@lru_cache(maxsize=1)
def _compiled():
    # One compiled function for all layers: its cache is keyed by shapes, dtypes,
    # grid and scale, so that every layer of a network reuses the first's kernel.
    return torch.compile(flex_attention_uncompiled, dynamic=False)


def flex_prior_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    compiling: bool,
) -> Tensor:
    """``softmax(omega * (q k^T * scale)) v`` in one fused kernel.

    Compiled once per shape (tens of seconds) unless the caller is itself being
    compiled. Arguments as in :func:`~spvit_mm.ops.spatial_prior_attention`,
    already checked.
    """
    if not torch.is_grad_enabled():
        # On the CPU FlexAttention refuses tensors that require gradients even then.
        q, k, v, table = (x.detach() for x in (q, k, v, table))
    function = flex_attention_uncompiled if compiling else _compiled()
    return function(q, k, v, table.float(), tuple(hw), scale, num_extra_tokens)


# What was tried, by all that the compiled kernel depends on.
_tried: set[tuple] = set()
# Kinds of inputs with which it failed; their other shapes are not tried any more.
_failed: set[tuple] = set()


def flex_works(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
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
    The first failure of a kind of inputs is told in a warning.

    Arguments as in :func:`flex_prior_attention`, and:

    Args:
        needs_grad (bool): Whether a backward pass may follow.

    Raises:
        torch.cuda.OutOfMemoryError: Where memory is short, the kernel is not at
            fault, and a kernel that takes more would not help.
    """
    inputs = (q, k, v, table)
    kind = (q.device, q.dtype, q.shape[-1], v.shape[-1], needs_grad)
    if kind in _failed:
        return False
    key = (
        *kind,
        *((x.shape, x.stride(), x.requires_grad) for x in inputs),
        (*hw, scale, num_extra_tokens),
    )
    if key in _tried:
        return True
    try:
        trial = [
            x.detach().requires_grad_(needs_grad and x.requires_grad) for x in inputs
        ]
        out = flex_prior_attention(*trial, hw, scale, num_extra_tokens, False)
        leaves = [x for x in trial if x.requires_grad]
        if leaves:
            torch.autograd.grad(out, leaves, torch.zeros_like(out))
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise errors of every class
        _failed.add(kind)
        reason = str(error).strip().splitlines() or ['no message']
        warnings.warn(
            f'FlexAttention does not run here for {q.dtype} with {q.shape[-1]} channels '
            f"a head ({type(error).__name__}: {reason[0]}), so attn_impl='auto' takes "
            "'eager', which needs memory for all pairs of tokens. attn_impl='chunked' "
            'needs less.',
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    _tried.add(key)
    return True
