"""Blocks of queries that stay in the cache; memory grows as N, not N^2.

A block is a few rows of the grid for a few heads of one image (or all rows of all
heads, and of several images, when they are small). For each block

    S = scale * q k^T      E = exp(omega * S + beta - m)      out = E v / rowsum(E)

where ``m`` is a shift per row that a softmax does not see. It is needed only
where ``exp`` comes near the ends of the type's range, and the row sums tell when
that was so: then, and for what follows in the call, the heads are done again with
the row's maximum as their shift. So almost every network is spared the two passes
over the scores that a shift costs. The division by the row's sum is left to the
(rows, d) result. A pair that is not kept has beta = -inf, so that its E is 0.

Keys and values are taken in reverse order, so that omega and beta of all pairs are
views of a table's strip (:mod:`~spvit_mm.ops.prior`); a softmax does not see the order.

Where only near offsets are kept, a block is a *band* of rows, whose keys are the rows of
the grid that its queries reach: one piece of k and of v, so nothing is copied.

The backward pass computes each block afresh (as FlashAttention does, Dao et al.,
arXiv 2205.14135): saved are q, k, v, the tables, the result and one or two numbers
a row. With ``g' = g / rowsum(E)`` and ``D = rowsum(g' * out)``,

    dV = E^T g'            dL = E * (g' v^T - D)
    dS = omega * dL        dQ = scale * dS k           dK = scale * dS^T q

and the tables' gradients are folded from the sums over images, of dL * S for the
prior and of dL for the bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compat import compute_dtype
from .prior import expand_columns, fold_columns, windows

# Row sums of exp between these need no shift: every logit that counts then lies
# within +-41, and products with values and gradients stay far from the ends of
# float32.
_SMALL_SUM, _LARGE_SUM = 1e-18, 1e18
# Biases below it, minus infinity first, make some of the exp 0.
_DEEP = -80.0
# Bytes of the scores of one block, per thread: the second-level cache of current server
# cores. Much less makes products of few rows, which are slow.
_BLOCK_BYTES = 2 << 20
# From this many blocks that share keys on, a row-major copy of k^T is repaid: products
# with it are up to a third faster.
_COPY_FROM = 4
# Queries of a band: fewer make products of few rows, more compute pairs that are far.
_BAND_QUERIES = 128
# Heads share bands while these have at most so many times the keys of the smaller one.
_ALIKE = 1.3


class Plan(NamedTuple):
    """How the work is cut: images, heads and grid rows per block."""

    images: int
    heads: int
    rows: int


class Block(NamedTuple):
    """Rows of the grid and their tokens; ``first`` of these are extra ones.

    ``keys`` are the columns of the scores that are computed, None for all.
    """

    t0: int
    t1: int
    y0: int
    y1: int
    first: int
    keys: Optional[slice] = None

    def num_keys(self, tokens: int) -> int:
        """How many of ``tokens`` keys are computed."""
        return tokens if self.keys is None else self.keys.stop - self.keys.start

    def near(self, x: Tensor, dim: int) -> Tensor:
        """The block's part of ``x``, which has the reversed keys in dimension ``dim``."""
        if self.keys is None:
            return x
        return x.narrow(dim, self.keys.start, self.num_keys(x.shape[dim]))


class Reach(NamedTuple):
    """How far the kept offsets lie from the query, in patches to each side."""

    up: int
    down: int
    left: int
    right: int

    def union(self, other: Reach) -> Reach:
        return Reach(*map(max, self, other))


class Band(NamedTuple):
    """Heads that are worked on together, rows of a block, and rows of keys it reaches."""

    heads: slice
    rows: int
    up: int
    down: int

    def keys(self, hw: tuple[int, int]) -> int:
        """The rows of keys of a block within the grid."""
        return min(hw[0], self.rows + self.up + self.down)


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
        Plan: Images per block, which is more than one only where all heads and rows
        of one image fit, and heads and grid rows per block.
    """
    height, width = hw
    tokens = height * width + extra
    budget = _BLOCK_BYTES * threads
    head = tokens * tokens * item
    if heads * head <= budget:
        # Several images a block must be copied side by side, which pays only
        # where a block of one would be too small to keep the threads busy.
        most = max(1, min(batch, budget // (8 * heads * head)))
        images = next(n for n in range(most, 0, -1) if batch % n == 0)
        return Plan(images, heads, height)
    # Few heads and many rows: then keys, values and tables stay in the cache, too.
    wanted = min(heads, max(1, budget // (head * threads)) * threads)
    together = next(n for n in range(wanted, heads + 1) if heads % n == 0)
    rows = budget // (together * width * tokens * item)
    return Plan(1, together, max(1, min(height, rows)))


def plan_bands(
    near: Sequence[Reach], hw: tuple[int, int], item: int, threads: int
) -> list[Band]:
    """Cut the grid into bands; neighbouring heads that reach alike share them.

    Args:
        near (Sequence[Reach]): One for each head.
        hw (tuple[int, int]): Grid.
        item (int): Bytes of one score.
        threads (int): Threads that work on one block together.
    """
    rows = min(hw[0], max(1, _BAND_QUERIES // hw[1]))
    bands = []
    for head, (up, down, *_) in enumerate(near):
        own = Band(slice(head, head + 1), rows, up, down)
        if bands:
            last = bands[-1]
            heads = slice(last.heads.start, head + 1)
            both = Band(heads, rows, max(last.up, up), max(last.down, down))
            size = (heads.stop - heads.start) * rows * both.keys(hw) * hw[1] ** 2 * item
            alike = both.keys(hw) <= _ALIKE * min(last.keys(hw), own.keys(hw))
            if alike and size <= _BLOCK_BYTES * threads:
                bands[-1] = both
                continue
        bands.append(own)
    return bands


def band_share(near: Sequence[Reach], hw: tuple[int, int]) -> float:
    """What part of all pairs the bands compute, the mean over the heads."""
    bands = plan_bands(near, hw, 1, 1)
    keys = sum((x.heads.stop - x.heads.start) * x.keys(hw) for x in bands)
    return keys / (len(near) * hw[0])


def _row_blocks(rows: int, hw: tuple[int, int], extra: int, band=None) -> list[Block]:
    height, width = hw
    blocks = []
    for y0 in range(0, height, rows):
        y1 = min(height, y0 + rows)
        first = extra if y0 == 0 else 0
        tokens = (extra + y0 * width - first, extra + y1 * width)
        keys = None
        if band is not None:
            above, below = max(0, y0 - band.up), min(height, y1 + band.down)
            keys = slice((height - below) * width, (height - above) * width)
        blocks.append(Block(*tokens, y0, y1, first, keys))
    return blocks


class _Scores:
    """A block's scores in one piece of memory: ``flat``, ``(matrices, rows, keys)``, and
    its ``grid``, the pairs without extra tokens, ``(images, heads, y, W, keys)``.

    The extra tokens are first among the rows and last among the keys.
    """

    def __init__(self, memory: Tensor, block: Block, shape: tuple, hw):
        height, width = hw
        scores = memory[: math.prod(shape)].view(shape)
        self.flat = scores.flatten(0, 1)
        pairs = scores[:, :, block.first :, : height * width]
        self.grid = pairs.unflatten(2, (block.y1 - block.y0, width))


class _Table:
    """A table as the blocks need it, and its gradient.

    Args:
        table (Tensor): ``(heads or 1, 2H-1, 2W-1)``.
        hw (tuple[int, int]): Grid.
        heads (int): Heads of the scores.
        pairs (bool): Whether to sum the gradient of all pairs before it is folded:
            fewer steps where many images have all their scores in one block.
    """

    def __init__(self, table: Tensor, hw, heads: int, pairs: bool) -> None:
        self.table, self.hw, self.pairs = table, hw, pairs
        self.strip = expand_columns(table, hw)
        self.values = windows(self.strip, hw).expand(heads, -1, -1, -1)
        self.grad: Optional[Tensor] = None

    def add_grad(self, of: slice, block: Block, one: Tensor, other: Optional[Tensor]):
        """Add ``one``, or ``one * other``, summed over images, to the gradient.

        Both are ``(images, heads, y, W, keys)``; ``of`` says which heads, and
        ``other`` is used up.
        """
        if self.grad is None:
            heads = self.values.shape[0]
            shape = self.values.shape if self.pairs else (heads, *self.strip.shape[1:])
            self.grad = one.new_zeros(shape)
        if len(one) > 1:
            one = one if other is None else other.mul_(one)
            one, other = one.sum(0, keepdim=True), None
        # The windows of a strip overlap, so that each row of the grid is added alone.
        grad = self.grad if self.pairs else windows(self.grad, self.hw)
        step = one.shape[2] if self.pairs else 1
        for y in range(0, one.shape[2], step):
            into = block.near(grad[of, block.y0 + y : block.y0 + y + step], 3)
            rows = slice(y, y + step)
            if other is None:
                into.add_(one[0, :, rows])
            else:
                into.addcmul_(one[0, :, rows], other[0, :, rows])

    def table_grad(self) -> Tensor:
        """The table's gradient, ``(heads, 2H-1, 2W-1)``; one head sums them all."""
        strip = self.grad
        if self.pairs:
            strip = strip.new_zeros(len(strip), *self.strip.shape[1:])
            into = windows(strip, self.hw)
            for y in range(self.hw[0]):
                into[:, y].add_(self.grad[:, y])
        grad = fold_columns(strip, self.hw)
        return grad.sum(0, keepdim=True) if len(self.table) == 1 else grad


class _Step:
    """One block of some heads: the memory it works in, and its omega and beta.

    Args:
        block (Block): The block.
        room (Tensor): Memory for scores, ``(buffers, numbers)``.
        shape (tuple): Of the scores, ``(images, heads, rows, keys)``.
        hw (tuple[int, int]): Grid.
        values (list): Omega and beta of all pairs of the heads, either may be None.
    """

    def __init__(self, block: Block, room: Tensor, shape: tuple, hw, values) -> None:
        self.block = block
        self.rows = slice(block.t0, block.t1)
        self.scores = [_Scores(memory, block, shape, hw) for memory in room]
        self.omega, self.beta = (
            None if x is None else block.near(x[:, block.y0 : block.y1], 3)
            for x in values
        )

    def logits(self, scores: _Scores, out: _Scores) -> None:
        """``out = omega * scores + beta``; ``out`` may be ``scores`` itself."""
        if out is not scores:
            grid, first = scores.grid.shape[-1], self.block.first
            out.flat[..., grid:].copy_(scores.flat[..., grid:])
            out.flat[:, :first].copy_(scores.flat[:, :first])
        if self.beta is None:
            torch.mul(scores.grid, self.omega, out=out.grid)
        elif self.omega is None:
            torch.add(scores.grid, self.beta, out=out.grid)
        else:
            torch.addcmul(self.beta, scores.grid, self.omega, out=out.grid)


class _Work:
    """How a call is cut, the memory of its blocks and its tables.

    ``groups`` are pairs: which matrices (of several images, all of them) are worked on
    together, and their steps.
    """

    def __init__(self, q, prior, bias, hw, extra: int, plan, buffers: int):
        batch, heads, tokens, _ = q.shape
        # Whether an exp without a shift may meet what it is slow at.
        self.deep = bias is not None and float(bias.min()) < _DEEP
        self.near = not isinstance(plan, Plan)
        if self.near:
            images, pairs = 1, False
            cut = [(x.heads, _row_blocks(x.rows, hw, 0, x)) for x in plan]
        else:
            images = plan.images
            pairs = (plan.heads, plan.rows) == (heads, hw[0]) and batch > 1
            blocks = _row_blocks(plan.rows, hw, extra)
            starts = range(0, heads, plan.heads)
            cut = [(slice(h, h + plan.heads), blocks) for h in starts]
        self.count = batch // images
        self.prior, self.bias = (
            None if table is None else _Table(table, hw, heads, pairs)
            for table in (prior, bias)
        )

        def shape(of: slice, block: Block) -> tuple[int, ...]:
            rows, keys = block.t1 - block.t0, block.num_keys(tokens)
            return images, of.stop - of.start, rows, keys

        most = max(math.prod(shape(of, x)) for of, blocks in cut for x in blocks)
        room = q.new_empty(buffers, most, dtype=compute_dtype(q.dtype))
        self.groups = []
        for of, blocks in cut:
            values = [
                None if table is None else table.values[of]
                for table in (self.prior, self.bias)
            ]
            steps = [_Step(x, room, shape(of, x), hw, values) for x in blocks]
            if images > 1:
                of = slice(0, images * heads)
            self.groups.append((of, steps))

    def images(self, *tensors: Tensor):
        """Yield the parts of the images that are worked on together.

        Tensors are ``(B, heads, T, ..)`` or ``(B * heads, T, ..)``.
        """
        return zip(*(x.split(len(x) // self.count) for x in tensors), strict=True)


def _like_projection(x: Tensor) -> Tensor:
    """An empty ``(B, heads, T, d)`` like ``x`` whose memory is ``(B, T, heads, d)``.

    That is the order in which the output projection reads it: merging the heads
    is then a view.
    """
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, heads, T, d)`` as ``(n * heads, T, d)``, without a copy for one image."""
    x = x[0] if len(x) == 1 else x.flatten(0, 1)
    return x if x.dtype == dtype else x.to(dtype)


def _reversed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, heads, T, d)`` as ``(n * heads, T, d)``, the last token first."""
    return _flat(x, dtype).flip(1)


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


def exp_(logits: Tensor, deep: bool) -> Tensor:
    """``exp`` in place, fast also where it is 0.

    The vector libraries of CPUs take minus infinity, and whatever else falls below the
    smallest ordinary number, one by one: some forty times slower than the rest.

    Args:
        logits (Tensor): Of a floating type.
        deep (bool): Whether there may be such: they are lifted to where ``exp`` is
            ordinary, and their results set to 0.
    """
    if not deep:
        return logits.exp_()
    tiny = torch.finfo(logits.dtype).tiny
    logits.clamp_(min=math.log(1.5 * tiny)).exp_()
    return F.threshold_(logits, 2 * tiny, 0.0)


class _Dropout:
    """Masks of 0 or 1 / (1 - p), the same in the same order for the same seed."""

    def __init__(self, p: float, seed: Optional[int], device) -> None:
        self.p = p
        if p:
            self.generator = torch.Generator(device=device).manual_seed(seed)

    def state(self) -> Optional[Tensor]:
        return self.generator.get_state() if self.p else None

    def rewind(self, state: Optional[Tensor]) -> None:
        if self.p:
            self.generator.set_state(state)

    def fill(self, mask: Tensor) -> Tensor:
        if self.p >= 1:
            return mask.zero_()
        return mask.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)


def _forward(q, k, v, prior, bias, hw, scale, extra, p, seed, plan):
    """The result, and the sums (and shifts) of the rows for the backward pass."""
    work = _Work(q, prior, bias, hw, extra, plan, buffers=2 if p else 1)
    dropout = _Dropout(p, seed, q.device)
    dtype = compute_dtype(q.dtype)
    out = _like_projection(v)
    sums = q.new_empty(q.shape[0] * q.shape[1], q.shape[2], 1, dtype=dtype)
    shifts, shifted = torch.empty_like(sums), False
    for q4, k4, v4, out4, total, shift in work.images(q, k, v, out, sums, shifts):
        q_all = _flat(q4, dtype)
        k_all, v_all = _reversed(k4, dtype), _reversed(v4, dtype)
        k_t = k_all.transpose(1, 2)
        if len(work.groups[0][1]) >= _COPY_FROM:
            k_t = k_t.contiguous()
        mixed = _target(out4, dtype)
        for of, steps in work.groups:
            k_of, v_of = k_t[of], v_all[of]
            while True:
                state = dropout.state()
                for step in steps:
                    rows = (of, step.rows)
                    s, *mask = step.scores
                    keys, values = step.block.near(k_of, 2), step.block.near(v_of, 1)
                    torch.baddbmm(
                        s.flat, q_all[rows], keys, beta=0, alpha=scale, out=s.flat
                    )
                    step.logits(s, s)
                    if shifted:
                        torch.amax(s.flat, -1, keepdim=True, out=shift[rows])
                        s.flat.sub_(shift[rows])
                    exp_(s.flat, shifted or work.deep)
                    torch.sum(s.flat, -1, keepdim=True, out=total[rows])
                    if p:
                        s.flat.mul_(dropout.fill(mask[0].flat))
                    torch.bmm(s.flat, values, out=mixed[rows])
                if shifted:
                    break
                low, high = torch.aminmax(total[of])
                # A NaN compares false: it takes the shift, and shows in the result.
                if float(low) >= _SMALL_SUM and float(high) <= _LARGE_SUM:
                    break
                shifts.zero_()
                shifted = True
                dropout.rewind(state)
        mixed.div_(total)
        _settle(out4, mixed)
    return out, sums, shifts if shifted else None


def _backward(grad, saved, needs, hw, scale, extra, p, seed, plan):
    """Gradients of q, k, v and of the tables that ``needs`` (prior, bias) names."""
    q, k, v, prior, bias, out, sums, shifts = saved
    work = _Work(q, prior, bias, hw, extra, plan, buffers=4 if p else 3)
    dropout = _Dropout(p, seed, q.device)
    dtype = compute_dtype(q.dtype)
    dq, dk, dv = (_like_projection(x) for x in (q, k, v))
    shifted = shifts is not None
    rest = (grad, out, dq, dk, dv, sums, shifts if shifted else sums)
    for parts in work.images(q, k, v, *rest):
        q4, k4, v4, grad4, out4, dq4, dk4, dv4, total, shift = parts
        q_all = _flat(q4, dtype)
        k_all, v_all = _reversed(k4, dtype), _reversed(v4, dtype)
        k_t, v_t = k_all.transpose(1, 2), v_all.transpose(1, 2)
        if len(work.groups[0][1]) >= _COPY_FROM:
            k_t, v_t = k_t.contiguous(), v_t.contiguous()
        g_all = _flat(grad4, dtype) / total
        dots = (g_all * _flat(out4, dtype)).sum(-1, keepdim=True)
        dq_all = _target(dq4, dtype)
        dk_all, dv_all = torch.empty_like(k_all), torch.empty_like(v_all)
        if work.near:
            dk_all.zero_()
            dv_all.zero_()
        for of, steps in work.groups:
            of_keys = [(k_all[of], 1), (k_t[of], 2), (v_t[of], 2)]
            of_keys += [(dk_all[of], 1), (dv_all[of], 1)]
            for step in steps:
                rows = (of, step.rows)
                e, d, s, *mask = step.scores
                keys, keys_t, values_t, dk_sum, dv_sum = (
                    step.block.near(x, dim) for x, dim in of_keys
                )
                if not needs[0]:
                    s = e  # the scores serve the prior's gradient alone
                q_rows, g, dq_rows = q_all[rows], g_all[rows], dq_all[rows]
                torch.baddbmm(s.flat, q_rows, keys_t, beta=0, alpha=scale, out=s.flat)
                step.logits(s, e)
                if shifted:
                    e.flat.sub_(shift[rows])
                exp_(e.flat, shifted or work.deep)
                torch.bmm(g, values_t, out=d.flat)
                weights = e.flat
                if p:
                    weights = dropout.fill(mask[0].flat)
                    d.flat.mul_(weights)
                    weights.mul_(e.flat)
                # The first of all keys overwrites what was there.
                add = int(work.near or step.block.t0 > 0)
                weights_t, d_t = weights.transpose(1, 2), d.flat.transpose(1, 2)
                torch.baddbmm(dv_sum, weights_t, g, beta=add, out=dv_sum)
                d.flat.sub_(dots[rows]).mul_(e.flat)
                if needs[1]:
                    work.bias.add_grad(of, step.block, d.grid, None)
                if needs[0]:
                    work.prior.add_grad(of, step.block, d.grid, s.grid)
                if step.omega is not None:
                    d.grid.mul_(step.omega)
                torch.baddbmm(dq_rows, d.flat, keys, beta=0, alpha=scale, out=dq_rows)
                torch.baddbmm(dk_sum, d_t, q_rows, beta=add, alpha=scale, out=dk_sum)
        _settle(dq4, dq_all)
        dk4.copy_(dk_all.flip(1).view(dk4.shape))
        dv4.copy_(dv_all.flip(1).view(dv4.shape))
    d_prior = work.prior.table_grad() if needs[0] else None
    d_bias = work.bias.table_grad() if needs[1] else None
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
    near: Optional[Sequence[Reach]] = None,
) -> Tensor:
    """``softmax(omega * (q k^T * scale) + beta) v`` in blocks of queries.

    Half-precision inputs are computed in float32, block by block, and rounded
    once at the end. Differentiable once with respect to q, k, v and the tables, of
    which there is at least one; the backward pass repeats the dropout masks from a
    seed drawn here from the device's default generator. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked; and ``near``: how
    far each head sees, all offsets whose bias is not minus infinity. Then there may be no
    extra tokens.
    """
    dtype = compute_dtype(q.dtype)
    prior, bias = (None if x is None else x.to(dtype) for x in (prior, bias))
    seed = int(torch.randint(1 << 62, ()).item()) if dropout_p else None
    batch, heads = q.shape[:2]
    threads = torch.get_num_threads()
    if near is None:
        plan = plan_blocks(batch, heads, hw, num_extra_tokens, dtype.itemsize, threads)
    else:
        plan = plan_bands(near, hw, dtype.itemsize, threads)
    inputs = (q, k, v, prior, bias)
    settings = (tuple(hw), scale, num_extra_tokens, dropout_p, seed, plan)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    ):
        return _ChunkedAttention.apply(*inputs, *settings)
    return _forward(*inputs, *settings)[0]
