"""Blocks of queries that stay in the cache; memory grows as N, not N^2.

A block is a few rows of the grid for all heads of one image (or all rows of
several images, when they are small). For each block

    S = scale * q k^T          E = exp(omega * S - m)          out = E v / rowsum(E)

where ``m`` is a shift per row that a softmax does not see. It is needed only
where ``exp`` could leave the range of the type; a bound on the logits,
``max|omega| * max|q| * max|k| * scale``, costs N * d and shows that it cannot in
almost every network, so that the two passes over the block that a shift costs
are saved. The division by the row's sum is left to the (rows, d) result.

The backward pass computes each block afresh (as FlashAttention does, Dao et al.,
arXiv 2205.14135): saved are q, k, v, the table, the result and one or two numbers a row.
With ``g' = g / rowsum(E)`` and ``D = rowsum(g' * out)``,

    dV = E^T g'      dL = E * (g' v^T - D)      dTable = fold(sum over images of dL * S)
    dS = omega * dL  dQ = scale * dS k          dK = scale * dS^T q
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .prior import expand_columns, fold_columns, row_slice

# Logits whose absolute value stays below this need no shift before exp: with
# exp(+-40) within 1e+-18, products with values and gradients stay far from the
# ends of float32.
_SAFE_LOGIT = 40.0
# Bytes of one N x N buffer of a block, per thread. Half a megabyte of scores and
# as much prior fit the second-level cache of current server cores (1-2 MB).
_BLOCK_BYTES = 1 << 19


class Plan(NamedTuple):
    """How the work is cut: images and grid rows per block."""

    images: int
    rows: int


def plan_blocks(
    batch: int, heads: int, hw: tuple[int, int], extra: int, item: int, threads: int
) -> Plan:
    """Choose blocks whose scores fill the threads' share of the cache.

    Args:
        batch (int): Images.
        heads (int): Heads of one image.
        hw (tuple[int, int]): Grid.
        extra (int): Tokens in front of the grid's.
        item (int): Bytes of one score.
        threads (int): Threads that work on one block together.

    Returns:
        Plan: Images per block, which is more than one only where all rows of one
        image fit, and grid rows per block.
    """
    height, width = hw
    tokens = height * width + extra
    budget = _BLOCK_BYTES * max(threads, 1)
    image = heads * tokens * tokens * item
    if image <= budget:
        return Plan(max(1, min(batch, budget // image)), height)
    rows = budget // (heads * width * tokens * item)
    return Plan(1, max(1, min(height, rows)))


class _Prior:
    """The prior as the blocks need it: multiplied in place, and its gradient.

    For several images whose rows all lie in one block the prior of all pairs is
    written once and shared by them; else each row of the grid is a view of the strip.
    """

    def __init__(self, table: Tensor, hw, extra: int, plan: Plan, batch: int) -> None:
        self.hw, self.extra = hw, extra
        self.strip = expand_columns(table, hw)
        self.whole = None
        if plan.rows == hw[0] and batch > 1:
            width, tokens = hw[1], hw[0] * hw[1]
            self.whole = table.new_empty(table.shape[0], tokens, tokens)
            for y in range(hw[0]):
                rows = self.whole[:, y * width : (y + 1) * width]
                rows.copy_(self.strip[:, :, row_slice(y, hw)])
        self.grad: Optional[Tensor] = None

    def mul(self, scores: Tensor, y0: int, y1: int, first: int) -> None:
        """``scores *= omega`` for rows ``y0..y1`` of the grid.

        Args:
            scores (Tensor): ``(images, heads, rows, tokens)``; changed in place.
            y0 (int): First row of the grid.
            y1 (int): One past the last.
            first (int): Extra tokens among the block's queries; prior 1.
        """
        width = self.hw[1]
        if self.whole is not None:
            scores[:, :, first:, self.extra :].mul_(self.whole)
            return
        for y in range(y0, y1):
            low = first + (y - y0) * width
            rows = scores[:, :, low : low + width, self.extra :]
            rows.mul_(self.strip[:, :, row_slice(y, self.hw)])

    def add_grad(self, d_logits: Tensor, scores: Tensor, y0, y1, first) -> None:
        """Add ``sum over images of d_logits * scores`` to the gradient of the prior.

        Both are ``(images, heads, rows, tokens)``; ``scores`` is used up.
        """
        width = self.hw[1]
        grad_rows = d_logits[:, :, first:, self.extra :]
        rows = scores[:, :, first:, self.extra :]
        heads = rows.shape[1]
        if self.grad is None:
            shape = (self.strip if self.whole is None else self.whole).shape[1:]
            self.grad = rows.new_zeros(heads, *shape)
        one = rows.shape[0] == 1
        if not one:
            rows.mul_(grad_rows)
        if self.whole is not None:
            if one:
                self.grad.addcmul_(rows[0], grad_rows[0])
            else:
                self.grad.add_(rows.sum(0))
            return
        for y in range(y0, y1):
            at = slice((y - y0) * width, (y - y0 + 1) * width)
            into = self.grad[:, :, row_slice(y, self.hw)]
            if one:
                into.addcmul_(rows[0, :, at], grad_rows[0, :, at])
            else:
                into.add_(rows[:, :, at].sum(0))

    def table_grad(self, heads: int) -> Tensor:
        """The table's gradient, ``(heads, 2H-1, 2W-1)``; one head sums them all."""
        grad = self.grad
        if heads == 1:
            grad = grad.sum(0, keepdim=True)
        if self.whole is not None:
            width = self.hw[1]
            strip = torch.zeros_like(self.strip)
            for y in range(self.hw[0]):
                rows = grad[:, y * width : (y + 1) * width]
                strip[:, :, row_slice(y, self.hw)].add_(rows)
            grad = strip
        return fold_columns(grad, self.hw)


def _like_projection(x: Tensor, dim: int) -> Tensor:
    """An empty ``(B, heads, T, dim)`` whose memory is ``(B, T, heads, dim)``.

    That is the order in which the output projection reads it: merging the heads
    is then a view.
    """
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _blocks(plan: Plan, batch: int, hw: tuple[int, int], extra: int):
    """Yield, image group by image group, its row blocks.

    Yields:
        tuple: ``(b0, b1, [(t0, t1, y0, y1, first), ...])``: images, then token
        and grid rows of each block and how many of its tokens are extra ones.
    """
    height, width = hw
    rows = []
    for y0 in range(0, height, plan.rows):
        y1 = min(height, y0 + plan.rows)
        first = extra if y0 == 0 else 0
        rows.append((extra + y0 * width - first, extra + y1 * width, y0, y1, first))
    for b0 in range(0, batch, plan.images):
        yield b0, min(batch, b0 + plan.images), rows


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, heads, T, d)`` as ``(n * heads, T, d)``, without a copy for one image."""
    return x.to(dtype).flatten(0, 1)


def _drop(mask: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Fill ``mask`` with 0 or 1 / (1 - p), the same for the same generator state."""
    if p >= 1:
        return mask.zero_()
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _generator(seed: Optional[int], device) -> Optional[torch.Generator]:
    if seed is None:
        return None
    return torch.Generator(device=device).manual_seed(seed)


def _needs_shift(q: Tensor, k: Tensor, table: Tensor, scale: float) -> bool:
    """Whether some logit might exceed the range in which exp needs no shift."""
    norms = torch.linalg.vector_norm(q, dim=-1, dtype=table.dtype).amax()
    norms = norms * torch.linalg.vector_norm(k, dim=-1, dtype=table.dtype).amax()
    bound = norms * table.abs().amax().clamp(min=1.0) * abs(scale)
    # Written so that a NaN asks for the shift, and then shows in the result.
    return not bool(bound <= _SAFE_LOGIT)


def _forward(q, k, v, table, hw, scale, extra, p, seed, plan, shift):
    """The result, and the sums (and shifts) of the rows for the backward pass."""
    batch, heads, tokens, dim = q.shape
    dtype = table.dtype
    generator = _generator(seed, q.device)
    prior = _Prior(table, hw, extra, plan, batch)
    out = _like_projection(q, v.shape[-1])
    sums = table.new_empty(batch, heads, tokens, 1)
    shifts = table.new_empty(batch, heads, tokens, 1) if shift else None
    most = plan.rows * hw[1] + extra
    room = table.new_empty(plan.images * heads * most * tokens)
    drop = torch.empty_like(room) if p else None
    for b0, b1, rows in _blocks(plan, batch, hw, extra):
        n = (b1 - b0) * heads
        q_all = _flat(q[b0:b1], dtype)
        # Row-major copies of k^T and v: a third faster products than strided ones.
        k_t = _flat(k[b0:b1], dtype).transpose(1, 2).contiguous()
        v_all = _flat(v[b0:b1], dtype).contiguous()
        for t0, t1, y0, y1, first in rows:
            size = n * (t1 - t0) * tokens
            s = room[:size].view(n, t1 - t0, tokens)
            torch.baddbmm(s, q_all[:, t0:t1], k_t, beta=0, alpha=scale, out=s)
            prior.mul(s.view(b1 - b0, heads, t1 - t0, tokens), y0, y1, first)
            if shift:
                top = s.amax(-1, keepdim=True)
                s.sub_(top)
                shifts[b0:b1, :, t0:t1] = top.view(b1 - b0, heads, t1 - t0, 1)
            s.exp_()
            total = s.sum(-1, keepdim=True).view(b1 - b0, heads, t1 - t0, 1)
            sums[b0:b1, :, t0:t1] = total
            if p:
                s.mul_(_drop(drop[:size].view_as(s), p, generator))
            mixed = torch.bmm(s, v_all).view(b1 - b0, heads, t1 - t0, -1)
            out[b0:b1, :, t0:t1] = mixed.div_(total)
    return out, sums, shifts


def _backward(
    grad, q, k, v, table, out, sums, shifts, needs, hw, scale, extra, p, seed, plan
):
    """Gradients of q, k, v and the table (None where ``needs`` says so)."""
    batch, heads, tokens, dim = q.shape
    dtype = table.dtype
    generator = _generator(seed, q.device)
    prior = _Prior(table, hw, extra, plan, batch)
    dq, dk, dv = (
        _like_projection(q, dim),
        _like_projection(k, dim),
        _like_projection(v, v.shape[-1]),
    )
    most = plan.rows * hw[1] + extra
    rooms = table.new_empty(3 if not p else 4, plan.images * heads * most * tokens)
    for b0, b1, rows in _blocks(plan, batch, hw, extra):
        images = b1 - b0
        n = images * heads
        q_all = _flat(q[b0:b1], dtype)
        k_all = _flat(k[b0:b1], dtype).contiguous()
        k_t = k_all.transpose(1, 2).contiguous()
        v_t = _flat(v[b0:b1], dtype).transpose(1, 2).contiguous()
        dk_sum = torch.zeros_like(k_all)
        dv_sum = table.new_zeros(n, tokens, v.shape[-1])
        for t0, t1, y0, y1, first in rows:
            length = t1 - t0
            size = n * length * tokens
            s, e, d = (room[:size].view(n, length, tokens) for room in rooms[:3])
            s4, e4, d4 = (x.view(images, heads, length, tokens) for x in (s, e, d))
            q_rows = q_all[:, t0:t1]
            torch.baddbmm(s, q_rows, k_t, beta=0, alpha=scale, out=s)
            e.copy_(s)
            prior.mul(e4, y0, y1, first)
            if shifts is not None:
                e4.sub_(shifts[b0:b1, :, t0:t1])
            e.exp_()
            g = grad[b0:b1, :, t0:t1] / sums[b0:b1, :, t0:t1]
            dot = (g * out[b0:b1, :, t0:t1]).sum(-1, keepdim=True)
            g = g.reshape(n, length, -1)
            torch.bmm(g, v_t, out=d)
            if p:
                mask = _drop(rooms[3][:size].view_as(s), p, generator)
                d.mul_(mask)
                dv_sum.baddbmm_(mask.mul_(e).transpose(1, 2), g)
            else:
                dv_sum.baddbmm_(e.transpose(1, 2), g)
            d4.sub_(dot)
            d.mul_(e)
            if needs[3]:
                prior.add_grad(d4, s4, y0, y1, first)
            prior.mul(d4, y0, y1, first)
            dq_rows = torch.bmm(d, k_all).mul_(scale)
            dq[b0:b1, :, t0:t1] = dq_rows.view(images, heads, length, dim)
            dk_sum.baddbmm_(d.transpose(1, 2), q_rows, alpha=scale)
        dk[b0:b1] = dk_sum.view(images, heads, tokens, dim)
        dv[b0:b1] = dv_sum.view(images, heads, tokens, -1)
    d_table = prior.table_grad(table.shape[0]) if needs[3] else None
    return dq, dk, dv, d_table


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table, hw, scale, extra, p, seed, plan):
        shift = _needs_shift(q, k, table, scale)
        out, sums, shifts = _forward(
            q, k, v, table, hw, scale, extra, p, seed, plan, shift
        )
        ctx.save_for_backward(q, k, v, table, out, sums, shifts)
        ctx.settings = (hw, scale, extra, p, seed, plan)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = _backward(
            grad, *ctx.saved_tensors, ctx.needs_input_grad[:4], *ctx.settings
        )
        return *grads, None, None, None, None, None, None


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
) -> Tensor:
    """``softmax(omega * (q k^T * scale)) v`` in blocks of queries.

    Half-precision inputs are computed in float32, block by block, and rounded
    once at the end. Differentiable once with respect to q, k, v and the table;
    the backward pass repeats the dropout masks from a seed drawn here from the
    device's default generator. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked.
    """
    table = table.to(torch.promote_types(q.dtype, torch.float32))
    seed = int(torch.randint(1 << 62, ()).item()) if dropout_p else None
    plan = plan_blocks(
        q.shape[0],
        q.shape[1],
        hw,
        num_extra_tokens,
        table.element_size(),
        torch.get_num_threads(),
    )
    args = (q, k, v, table, tuple(hw), scale, num_extra_tokens, dropout_p, seed, plan)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, table)):
        return _ChunkedAttention.apply(*args)
    return _forward(*args, _needs_shift(q, k, table, scale))[0]
