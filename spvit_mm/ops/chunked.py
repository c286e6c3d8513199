"""Blocks of queries that stay in the cache; memory grows as N, not N^2.

A block is a few rows of the grid for all heads of one image (or all rows of
several images, when they are small). For each block

    S = scale * q k^T      E = exp(omega * S + beta - m)      out = E v / rowsum(E)

where ``m`` is a shift per row that a softmax does not see. It is needed only
where ``exp`` comes near the ends of the type's range, and the row sums tell when
that was so: then, and for what follows in the call, the block is done again with
the row's maximum as its shift. So almost every network is spared the two passes
over the block that a shift costs. The division by the row's sum is left to the
(rows, d) result. A pair that is not kept has beta = -inf, so that its E is 0.

The backward pass computes each block afresh (as FlashAttention does, Dao et al.,
arXiv 2205.14135): saved are q, k, v, the tables, the result and one or two numbers
a row. With ``g' = g / rowsum(E)`` and ``D = rowsum(g' * out)``,

    dV = E^T g'            dL = E * (g' v^T - D)
    dS = omega * dL        dQ = scale * dS k           dK = scale * dS^T q

and the tables' gradients are folded from the sums over images, of dL * S for the
prior and of dL for the bias.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compat import compute_dtype
from .prior import expand_columns, fold_columns, row_slice

# Row sums of exp between these need no shift: every logit that counts then lies
# within +-41, and products with values and gradients stay far from the ends of
# float32.
_SMALL_SUM, _LARGE_SUM = 1e-18, 1e18
# Bytes of the scores of one block, per thread. With the block's prior beside them
# they fill the second-level cache of current server cores (2 MB).
_BLOCK_BYTES = 3 << 19
# From this many blocks that share keys and values on, row-major copies of k^T and
# v are repaid: products with them are up to a third faster than with slices of a
# joint projection.
_COPY_FROM = 4


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
        # Several images a block must be copied side by side, which pays only
        # where a block of one would be too small to keep the threads busy.
        return Plan(max(1, min(batch, budget // (8 * image))), height)
    rows = budget // (heads * width * tokens * item)
    return Plan(1, max(1, min(height, rows)))


class _Table:
    """A table as the blocks need it, and its gradient.

    For several images whose rows all lie in one block the values of all pairs are
    written once and shared by them; else each row of the grid is a view of the strip.
    """

    def __init__(self, table: Tensor, hw, whole: bool) -> None:
        self.hw, self.heads = hw, table.shape[0]
        self.values = self.strip = expand_columns(table, hw)
        if whole:
            width, tokens = hw[1], hw[0] * hw[1]
            self.values = table.new_empty(self.heads, tokens, tokens)
            for y in range(hw[0]):
                rows = self.values[:, y * width : (y + 1) * width]
                rows.copy_(self.strip[:, :, row_slice(y, hw)])
        self.grad: Optional[Tensor] = None

    def add_grad(self, at: tuple, one: Tensor, other: Optional[Tensor]) -> None:
        """Add ``one``, or ``one * other``, summed over images, to the gradient.

        Both are ``(images, heads, rows, H * W)`` and lie at ``at`` of the values.
        ``other`` is used up.
        """
        if self.grad is None:
            self.grad = one.new_zeros(one.shape[1], *self.values.shape[1:])
        into = self.grad[at]
        if other is None:
            into.add_(one[0] if len(one) == 1 else one.sum(0))
        elif len(one) == 1:
            into.addcmul_(one[0], other[0])
        else:
            into.add_(other.mul_(one).sum(0))

    def table_grad(self) -> Tensor:
        """The table's gradient, ``(heads, 2H-1, 2W-1)``; one head sums them all."""
        grad = self.grad
        if self.heads == 1:
            grad = grad.sum(0, keepdim=True)
        if self.values is not self.strip:
            width = self.hw[1]
            strip = torch.zeros_like(self.strip)
            for y in range(self.hw[0]):
                rows = grad[:, y * width : (y + 1) * width]
                strip[:, :, row_slice(y, self.hw)].add_(rows)
            grad = strip
        return fold_columns(grad, self.hw)


class _Tables:
    """The prior and the bias, where there are, on the scores of a block.

    In every method, ``y0`` and ``y1`` are the block's first row of the grid and one
    past its last, and ``first`` counts the extra tokens among its queries.
    """

    def __init__(self, prior, bias, hw, extra: int, plan: Plan, batch: int) -> None:
        self.hw, self.extra = hw, extra
        self.whole = plan.rows == hw[0] and batch > 1
        self.prior, self.bias = (
            None if table is None else _Table(table, hw, self.whole)
            for table in (prior, bias)
        )

    def _parts(self, y0: int, y1: int, first: int):
        """Yield where pairs of patches lie, in the block and in a table's values."""
        grid = slice(self.extra, None)
        if self.whole:
            yield (..., slice(first, None), grid), (...,)
            return
        width = self.hw[1]
        for y in range(y0, y1):
            low = first + (y - y0) * width
            yield (..., slice(low, low + width), grid), (..., row_slice(y, self.hw))

    def logits(self, scores: Tensor, out: Tensor, y0: int, y1: int, first: int):
        """``out = omega * scores + beta``.

        Args:
            scores (Tensor): ``(images, heads, rows, tokens)``.
            out (Tensor): Like ``scores``, or ``scores`` itself.
        """
        if out is not scores and self.extra:
            out[..., : self.extra].copy_(scores[..., : self.extra])
            out[:, :, :first].copy_(scores[:, :, :first])
        for at, of in self._parts(y0, y1, first):
            if self.prior is None:
                torch.add(scores[at], self.bias.values[of], out=out[at])
            elif self.bias is None:
                torch.mul(scores[at], self.prior.values[of], out=out[at])
            else:
                omega, beta = self.prior.values[of], self.bias.values[of]
                torch.addcmul(beta, scores[at], omega, out=out[at])

    def multiply(self, x: Tensor, y0: int, y1: int, first: int) -> None:
        """``x = omega * x``, for the gradient of the scores."""
        if self.prior is not None:
            for at, of in self._parts(y0, y1, first):
                x[at].mul_(self.prior.values[of])

    def add_grads(self, d_logits, scores: Optional[Tensor], y0, y1, first, needs):
        """Add to the gradients of the tables that ``needs`` (prior, bias) names.

        Both are ``(images, heads, rows, tokens)``; ``scores`` is used up, and is
        not looked at without a gradient of the prior.
        """
        for at, of in self._parts(y0, y1, first):
            if needs[1]:
                self.bias.add_grad(of, d_logits[at], None)
            if needs[0]:
                self.prior.add_grad(of, d_logits[at], scores[at])


def _like_projection(x: Tensor) -> Tensor:
    """An empty ``(B, heads, T, d)`` like ``x`` whose memory is ``(B, T, heads, d)``.

    That is the order in which the output projection reads it: merging the heads
    is then a view.
    """
    batch, heads, tokens, dim = x.shape
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


def _target(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to write ``(n * heads, T, d)``: ``x`` itself if its memory allows.

    ``x`` is ``(n, heads, T, d)``; one image of it is a strided batch of matrices
    that a product can write to. Otherwise an own tensor, for :func:`_settle`.
    """
    if x.shape[0] == 1 and x.dtype == dtype:
        return x[0]
    return x.new_empty(x.shape, dtype=dtype).flatten(0, 1)


def _settle(x: Tensor, target: Tensor) -> None:
    """Copy what was written to an own tensor of :func:`_target` into ``x``."""
    if x.shape[0] > 1 or x.dtype != target.dtype:
        x.copy_(target.view(x.shape))


def _drop(mask: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Fill ``mask`` with 0 or 1 / (1 - p), the same for the same generator state."""
    if p >= 1:
        return mask.zero_()
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _generator(seed: Optional[int], device) -> Optional[torch.Generator]:
    if seed is None:
        return None
    return torch.Generator(device=device).manual_seed(seed)


def _room(blocks: int, q: Tensor, hw, extra: int, plan: Plan) -> Tensor:
    """Memory for that many blocks of scores, one after another."""
    batch, heads, tokens, _ = q.shape
    most = min(plan.images, batch) * heads * (plan.rows * hw[1] + extra) * tokens
    return q.new_empty(blocks, most, dtype=compute_dtype(q.dtype))


def _forward(q, k, v, prior, bias, hw, scale, extra, p, seed, plan):
    """The result, and the sums (and shifts) of the rows for the backward pass."""
    batch, heads, tokens, _ = q.shape
    generator = _generator(seed, q.device)
    tables = _Tables(prior, bias, hw, extra, plan, batch)
    out = _like_projection(v)
    room = _room(2 if p else 1, q, hw, extra, plan)
    dtype = room.dtype
    sums = room.new_empty(batch, heads, tokens, 1)
    shifts = None
    for b0, b1, rows in _blocks(plan, batch, hw, extra):
        images = b1 - b0
        n = images * heads
        q_all, k_all, v_all = (_flat(x[b0:b1], dtype) for x in (q, k, v))
        k_t = k_all.transpose(1, 2)
        if len(rows) >= _COPY_FROM:
            k_t, v_all = k_t.contiguous(), v_all.contiguous()
        for t0, t1, y0, y1, first in rows:
            length = t1 - t0
            s = room[0, : n * length * tokens].view(n, length, tokens)
            s4 = s.view(images, heads, length, tokens)
            total = sums[b0:b1, :, t0:t1]
            while True:
                torch.baddbmm(s, q_all[:, t0:t1], k_t, beta=0, alpha=scale, out=s)
                tables.logits(s4, s4, y0, y1, first)
                if shifts is not None:
                    shifts[b0:b1, :, t0:t1] = s4.amax(-1, keepdim=True)
                    s4.sub_(shifts[b0:b1, :, t0:t1])
                s.exp_()
                torch.sum(s4, -1, keepdim=True, out=total)
                if shifts is not None:
                    break
                low, high = torch.aminmax(total)
                # A NaN compares false: it takes the shift, and shows in the result.
                if float(low) >= _SMALL_SUM and float(high) <= _LARGE_SUM:
                    break
                shifts = torch.zeros_like(sums)
            if p:
                s.mul_(_drop(room[1, : s.numel()].view_as(s), p, generator))
            block = out[b0:b1, :, t0:t1]
            mixed = _target(block, dtype)
            torch.bmm(s, v_all, out=mixed)
            mixed.view(images, heads, length, -1).div_(total)
            _settle(block, mixed)
    return out, sums, shifts


def _backward(grad, saved, needs, hw, scale, extra, p, seed, plan):
    """Gradients of q, k, v and of the tables that ``needs`` (prior, bias) names."""
    q, k, v, prior, bias, out, sums, shifts = saved
    batch, heads, tokens, _ = q.shape
    generator = _generator(seed, q.device)
    tables = _Tables(prior, bias, hw, extra, plan, batch)
    dq, dk, dv = (_like_projection(x) for x in (q, k, v))
    room = _room(4, q, hw, extra, plan)
    dtype = room.dtype
    for b0, b1, rows in _blocks(plan, batch, hw, extra):
        images = b1 - b0
        n = images * heads
        q_all, k_all, v_all = (_flat(x[b0:b1], dtype) for x in (q, k, v))
        k_t, v_t = k_all.transpose(1, 2), v_all.transpose(1, 2)
        if len(rows) >= _COPY_FROM:
            k_all, k_t, v_t = k_all.contiguous(), k_t.contiguous(), v_t.contiguous()
        dk_sum, dv_sum = _target(dk[b0:b1], dtype), _target(dv[b0:b1], dtype)
        for t0, t1, y0, y1, first in rows:
            length = t1 - t0
            four = (images, heads, length, tokens)
            e4, d4, s4, drop = (x[: n * length * tokens].view(four) for x in room)
            if not needs[0]:
                s4 = e4  # the scores serve the prior's gradient alone
            s, e, d = s4.flatten(0, 1), e4.flatten(0, 1), d4.flatten(0, 1)
            q_rows = q_all[:, t0:t1]
            torch.baddbmm(s, q_rows, k_t, beta=0, alpha=scale, out=s)
            tables.logits(s4, e4, y0, y1, first)
            if shifts is not None:
                e4.sub_(shifts[b0:b1, :, t0:t1])
            e.exp_()
            g4 = grad[b0:b1, :, t0:t1] / sums[b0:b1, :, t0:t1]
            dot = (g4 * out[b0:b1, :, t0:t1]).sum(-1, keepdim=True)
            g = g4.flatten(0, 1)
            torch.bmm(g, v_t, out=d)
            weights = e
            if p:
                weights = _drop(drop.flatten(0, 1), p, generator)
                d.mul_(weights)
                weights.mul_(e)
            keep = int(t0 > 0)  # the first block overwrites what the memory held
            torch.baddbmm(dv_sum, weights.transpose(1, 2), g, beta=keep, out=dv_sum)
            d4.sub_(dot).mul_(e4)
            if any(needs):
                tables.add_grads(d4, s4, y0, y1, first, needs)
            tables.multiply(d4, y0, y1, first)
            block = dq[b0:b1, :, t0:t1]
            dq_rows = _target(block, dtype)
            torch.baddbmm(dq_rows, d, k_all, beta=0, alpha=scale, out=dq_rows)
            _settle(block, dq_rows)
            torch.baddbmm(
                dk_sum, d.transpose(1, 2), q_rows, beta=keep, alpha=scale, out=dk_sum
            )
        _settle(dk[b0:b1], dk_sum)
        _settle(dv[b0:b1], dv_sum)
    d_prior = tables.prior.table_grad() if needs[0] else None
    d_bias = tables.bias.table_grad() if needs[1] else None
    return dq, dk, dv, d_prior, d_bias


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prior, bias, *settings):
        out, sums, shifts = _forward(q, k, v, prior, bias, *settings)
        ctx.save_for_backward(q, k, v, prior, bias, out, sums, shifts)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[3:5]
        grads = _backward(grad, ctx.saved_tensors, needs, *ctx.settings)
        return *grads, *[None] * len(ctx.settings)


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
) -> Tensor:
    """``softmax(omega * (q k^T * scale) + beta) v`` in blocks of queries.

    Half-precision inputs are computed in float32, block by block, and rounded
    once at the end. Differentiable once with respect to q, k, v and the tables, of
    which there is at least one; the backward pass repeats the dropout masks from a
    seed drawn here from the device's default generator. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked.
    """
    dtype = compute_dtype(q.dtype)
    prior, bias = (None if x is None else x.to(dtype) for x in (prior, bias))
    seed = int(torch.randint(1 << 62, ()).item()) if dropout_p else None
    batch, heads = q.shape[:2]
    threads = torch.get_num_threads()
    plan = plan_blocks(batch, heads, hw, num_extra_tokens, dtype.itemsize, threads)
    inputs = (q, k, v, prior, bias)
    settings = (tuple(hw), scale, num_extra_tokens, dropout_p, seed, plan)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    ):
        return _ChunkedAttention.apply(*inputs, *settings)
    return _forward(*inputs, *settings)[0]
