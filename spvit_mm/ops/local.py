"""Attention over near keys alone: time and memory grow with what is kept.

On small grids the blocked kernel does it in bands of rows, see
:mod:`~spvit_mm.ops.chunked`: it computes all keys of the rows that a band reaches, but
copies nothing. On larger ones the grid is cut into tiles of queries. A tile attends to the smallest rectangle of keys
that holds all that its queries keep, and to the extra tokens:

    +---------------------+
    |  keys               |      tile of h x w queries, whose kept offsets reach
    |     +-------+       |      ``up``, ``down``, ``left``, ``right`` patches far:
    |     | tile  |       |
    |     +-------+       |      (h + up + down) (w + left + right) keys
    +---------------------+

What a table says of the pairs of a tile depends on the offsets alone, so it is laid out
once (the *block*) and serves all tiles; at the border of the grid a part of it. Heads
that reach alike share their tiles. Within a tile the work is that of the blocked kernel,
see :mod:`~spvit_mm.ops.chunked`: the softmax is shifted only where it must be, and the
backward pass computes the scores afresh.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import (
    _LARGE_SUM,
    _SMALL_SUM,
    Reach,
    _Dropout,
    band_share,
    chunked_attention,
    exp_,
)
from .compat import compute_dtype
from .prior import mask_bias

# Sides of a tile of queries.
TILE = 8
# Heads share tiles while their common rectangle has at most so many times the keys of
# the smaller one.
_ALIKE = 1.3
# What a pair of a tile costs, with its copies, in pairs of a band.
_TILE_PAIR = 1.5
# Bytes of the scores of one step; several images share a step while they fit.
_STEP_BYTES = 1 << 20


def keys_of_tile(reach: Reach, hw: tuple[int, int]) -> int:
    """Keys of a whole tile, at most those of the grid."""
    height, width = hw
    rows = min(height, min(TILE, height) + reach.up + reach.down)
    return rows * min(width, min(TILE, width) + reach.left + reach.right)


def reaches(keep: Tensor, hw: tuple[int, int]) -> list[Reach]:
    """The reach of every head.

    Args:
        keep (Tensor): ``(heads, 2H-1, 2W-1)``, bool, True at the zero offset.
        hw (tuple[int, int]): Grid.

    Returns:
        list[Reach]: One for each head.
    """
    sides = []
    for size, dim in zip(hw, (2, 1), strict=True):
        near = keep.any(dim).byte()
        before = size - 1 - near.argmax(1)
        after = size - 1 - near.flip(1).argmax(1)
        sides += [before.clamp(min=0), after.clamp(min=0)]
    return [Reach(*of_head) for of_head in torch.stack(sides, 1).tolist()]


def group_heads(found: list[Reach], hw: tuple[int, int]) -> list[tuple[list, Reach]]:
    """Put heads that reach alike together.

    Args:
        found (list[Reach]): One for each head.
        hw (tuple[int, int]): Grid.

    Returns:
        list[tuple[list, Reach]]: The heads of each group, and what holds all of them.
    """
    groups: list[tuple[list, Reach]] = []
    for head in sorted(range(len(found)), key=lambda i: keys_of_tile(found[i], hw)):
        for i, (heads, reach) in enumerate(groups):
            joint = reach.union(found[head])
            least = min(keys_of_tile(found[head], hw), keys_of_tile(reach, hw))
            if keys_of_tile(joint, hw) <= _ALIKE * least:
                groups[i] = ([*heads, head], joint)
                break
        else:
            groups.append(([head], found[head]))
    return [(sorted(heads), reach) for heads, reach in groups]


def tile_share(found: list[Reach], hw: tuple[int, int]) -> float:
    """What part of all pairs the tiles compute, the mean over the heads.

    Args:
        found (list[Reach]): One for each head.
        hw (tuple[int, int]): Grid.
    """
    keys = sum(
        len(heads) * keys_of_tile(reach, hw) for heads, reach in group_heads(found, hw)
    )
    return keys / (len(found) * hw[0] * hw[1])


def costs(
    found: list[Reach], hw: tuple[int, int], num_extra_tokens: int
) -> tuple[float, float]:
    """What bands cost, which take no extra tokens, and what tiles cost.

    Both as a part of all pairs in blocks.
    """
    bands = math.inf if num_extra_tokens else band_share(found, hw)
    return bands, _TILE_PAIR * tile_share(found, hw)


def local_cost(keep: Tensor, hw: tuple[int, int], num_extra_tokens: int) -> float:
    """What :func:`local_attention` costs, as a part of all pairs in blocks.

    Args:
        keep (Tensor): ``(heads, 2H-1, 2W-1)``, bool.
        hw (tuple[int, int]): Grid.
        num_extra_tokens (int): Tokens in front of the grid's.
    """
    return min(costs(reaches(keep, hw), hw, num_extra_tokens))


class _Tile(NamedTuple):
    """Where a tile and its keys lie in the grid, and the keys in the whole block."""

    rows: slice
    cols: slice
    key_rows: slice
    key_cols: slice
    part: tuple[slice, ...]  # of a block (heads, h, w, key rows, key columns)


def _tiles(hw: tuple[int, int], reach: Reach) -> list[_Tile]:
    height, width = hw
    tiles = []
    for y0 in range(0, height, TILE):
        y1 = min(y0 + TILE, height)
        k0, k1 = max(0, y0 - reach.up), min(height, y1 + reach.down)
        for x0 in range(0, width, TILE):
            x1 = min(x0 + TILE, width)
            c0, c1 = max(0, x0 - reach.left), min(width, x1 + reach.right)
            top, left = y0 - reach.up, x0 - reach.left
            part = (
                slice(None),
                slice(0, y1 - y0),
                slice(0, x1 - x0),
                slice(k0 - top, k1 - top),
                slice(c0 - left, c1 - left),
            )
            places = (slice(y0, y1), slice(x0, x1), slice(k0, k1), slice(c0, c1))
            tiles.append(_Tile(*places, part))
    return tiles


class _Block:
    """What a table says of the pairs of a tile, and its gradient.

    Args:
        table (Tensor): ``(heads, 2H-1, 2W-1)``.
        hw (tuple[int, int]): Grid.
        reach (Reach): Of the heads.
        extra (int): Extra tokens among the keys, in front.
        neutral (float): Their value.
    """

    def __init__(self, table, hw, reach, extra, neutral) -> None:
        self.hw, self.reach, self.extra, self.neutral = hw, reach, extra, neutral
        self.keys = (TILE + reach.up + reach.down, TILE + reach.left + reach.right)
        # Outside the table lies what no tile reads.
        near = F.pad(table, self._margins())
        pairs = near.unfold(1, self.keys[0], 1).unfold(2, self.keys[1], 1)
        self.whole = pairs.flip(1, 2)  # (heads, TILE, TILE, key rows, key columns)
        self.parts: dict[tuple, Tensor] = {}
        self.grad: Optional[Tensor] = None

    def _margins(self) -> tuple[int, int, int, int]:
        """What the near offsets have more than the table: left, right, up, down."""
        (height, width), reach = self.hw, self.reach
        return (
            reach.left + TILE - width,
            reach.right + TILE - width,
            reach.up + TILE - height,
            reach.down + TILE - height,
        )

    def at(self, tile: _Tile) -> Tensor:
        """The block of a tile, ``(heads, queries, extra + keys)``."""
        key = tuple((s.start, s.stop) for s in tile.part)
        if key not in self.parts:
            part = self.whole[tile.part]
            part = part.flatten(1, 2).flatten(2)
            if self.extra:
                part = F.pad(part, (self.extra, 0), value=self.neutral)
            self.parts[key] = part.contiguous()
        return self.parts[key]

    def add_grad(self, tile: _Tile, grad: Tensor) -> None:
        """Add the gradient ``(heads, queries, extra + keys)`` of a tile's block."""
        if self.grad is None:
            self.grad = grad.new_zeros(self.whole.shape)
        into = self.grad[tile.part]
        into += grad[..., self.extra :].reshape(into.shape)

    def table_grad(self) -> Tensor:
        """The gradient of the table, ``(heads, 2H-1, 2W-1)``."""
        rows, cols = self.keys
        near = self.grad.new_zeros(len(self.grad), rows + TILE - 1, cols + TILE - 1)
        for y in range(TILE):
            for x in range(TILE):
                top, left = TILE - 1 - y, TILE - 1 - x
                near[:, top : top + rows, left : left + cols] += self.grad[:, y, x]
        return F.pad(near, tuple(-margin for margin in self._margins()))


class _Group:
    """Heads that share their tiles, and the blocks of their tables."""

    def __init__(self, heads, reach, tables, hw, extra, dtype) -> None:
        self.heads = heads
        self.tiles = _tiles(hw, reach)
        prior, bias, keep = (self._own(table) for table in tables)
        beta = keep.new_zeros(keep.shape, dtype=dtype)
        if bias is not None:
            beta = bias.to(dtype)
        beta = beta.masked_fill(~keep, float('-inf'))
        self.beta = _Block(beta, hw, reach, extra, 0.0)
        self.omega = None
        if prior is not None:
            self.omega = _Block(prior.to(dtype), hw, reach, extra, 1.0)
        self.keys = extra + keys_of_tile(reach, hw)

    def _own(self, table):
        if table is None or table.shape[0] > 1:
            return table if table is None else table[self.heads]
        return table.expand(len(self.heads), -1, -1)

    def _neighbours(self) -> bool:
        return self.heads[-1] - self.heads[0] + 1 == len(self.heads)

    def take(self, x: Tensor, images: slice) -> Tensor:
        """The group's part of ``x`` (B, heads, ..): a view, if its heads are in a row."""
        if self._neighbours():
            return x[images, self.heads[0] : self.heads[-1] + 1]
        return x[images].index_select(1, torch.tensor(self.heads, device=x.device))

    def put(self, x: Tensor, images: slice, values: Tensor) -> None:
        """Write the group's part of ``x`` (B, heads, ..)."""
        if self._neighbours():
            x[images, self.heads[0] : self.heads[-1] + 1] = values
        else:
            index = torch.tensor(self.heads, device=x.device)
            x[images].index_copy_(1, index, values)

    def logits(self, scores: Tensor, tile: _Tile, out: Tensor) -> Tensor:
        """``omega * scores + beta``, (images, heads, queries, extra + keys)."""
        beta = self.beta.at(tile)
        if self.omega is None:
            return torch.add(scores, beta, out=out)
        return torch.addcmul(beta, scores, self.omega.at(tile), out=out)


class _Step:
    """Some images and one group of heads: what a tile needs of them."""

    def __init__(self, group, images, q, k, v, hw, extra, dtype) -> None:
        self.group, self.images = group, images
        self.hw, self.extra = hw, extra
        self.q, self.k, self.v = (self.take(x).to(dtype) for x in (q, k, v))
        self.shape = self.q.shape[:2]
        most = self.shape[0] * self.shape[1] * group.keys
        self.rooms = [x.new_empty(most * x.shape[-1]) for x in (self.k, self.v)]
        self.scores = [self.q.new_empty(most * TILE * TILE) for _ in range(3)]

    def take(self, x: Tensor) -> Tensor:
        """The step's part of ``x`` (B, heads, ..)."""
        return self.group.take(x, self.images)

    def grid(self, x: Tensor) -> Tensor:
        """The patches of (n, heads, extra + N, d) or of (n, heads, N, d)."""
        return x[:, :, x.shape[2] - self.hw[0] * self.hw[1] :].unflatten(2, self.hw)

    def rows(self, x: Tensor, tile: _Tile) -> Tensor:
        """The tile's queries of ``x`` (n, heads, N, d), as (n * heads, queries, d)."""
        x = self.grid(x)[:, :, tile.rows, tile.cols]
        return x.flatten(2, 3).flatten(0, 1)

    def near(self, tile: _Tile) -> list[Tensor]:
        """Keys and values of a tile, each (n * heads, extra + keys, d)."""
        found = []
        for x, room in zip((self.k, self.v), self.rooms, strict=True):
            window = self.grid(x)[:, :, tile.key_rows, tile.key_cols]
            size = window.shape[2] * window.shape[3]
            shape = (*self.shape, self.extra + size, x.shape[-1])
            joint = room[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
            joint[:, :, : self.extra] = x[:, :, : self.extra]
            joint[:, :, self.extra :].unflatten(2, window.shape[2:4]).copy_(window)
            found.append(joint.flatten(0, 1))
        return found

    def room(self, i: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Room for scores, (n, heads, queries, extra + keys)."""
        shape = (*self.shape, queries.shape[1], keys.shape[1])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        return self.scores[i][:size].view(shape)

    def put(self, x: Tensor, tile: _Tile, values: Tensor) -> None:
        """Write (n * heads, queries, d) to the tile's queries of ``x``."""
        into = self.grid(x)[:, :, tile.rows, tile.cols]
        into.copy_(values.view(into.shape))

    def add_near(self, x: Tensor, tile: _Tile, values: Tensor) -> None:
        """Add (n * heads, extra + keys, d) to the tile's keys in ``x``."""
        values = values.view(*self.shape, *values.shape[1:])
        x[:, :, : self.extra] += values[:, :, : self.extra]
        into = self.grid(x)[:, :, tile.key_rows, tile.key_cols]
        into += values[:, :, self.extra :].view(into.shape)


def _steps(groups, q, k, v, hw, extra, dtype):
    """Yield each group of heads with as many images as one step takes."""
    for group in groups:
        size = len(group.heads) * TILE * TILE * group.keys * dtype.itemsize
        images = max(1, _STEP_BYTES // size)
        for first in range(0, len(q), images):
            chosen = slice(first, min(len(q), first + images))
            yield group, _Step(group, chosen, q, k, v, hw, extra, dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * a b``, written to ``out`` (n, heads, queries, keys)."""
    flat = out.flatten(0, 1)
    torch.baddbmm(flat, a, b, beta=0, alpha=scale, out=flat)
    return out


def _forward(q, k, v, groups, hw, scale, extra, p, seed, dtype):
    """The patches' result (B, heads, N, d_v), and sums and shifts of its rows."""
    batch, heads, tokens, _ = q.shape
    dropout = _Dropout(p, seed, q.device)
    out = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    sums = q.new_empty(batch, heads, tokens, 1, dtype=dtype)
    shifts = None
    for group, step in _steps(groups, q, k, v, hw, extra, dtype):
        mixed = torch.empty_like(step.take(out), dtype=dtype)
        total = torch.empty_like(step.take(sums))
        shift = torch.zeros_like(total)
        for tile in group.tiles:
            queries, (keys, values) = step.rows(step.q, tile), step.near(tile)
            s = step.room(0, queries, keys)
            while True:
                _multiply(queries, keys.transpose(1, 2), s, scale)
                group.logits(s, tile, s)
                if shifts is not None:
                    most = s.amax(-1, keepdim=True)
                    s.sub_(most)
                    step.put(shift, tile, most)
                row = exp_(s, deep=True).sum(-1, keepdim=True)
                if shifts is not None:
                    break
                low, high = torch.aminmax(row)
                # A NaN compares false: it takes the shift, and shows in the result.
                if float(low) >= _SMALL_SUM and float(high) <= _LARGE_SUM:
                    break
                shifts = torch.zeros_like(sums)
            if p:
                s.mul_(dropout.fill(step.room(1, queries, keys)))
            step.put(total, tile, row)
            part = torch.bmm(s.flatten(0, 1), values)
            step.put(mixed, tile, part.div_(row.flatten(0, 1)))
        parts = [(out, mixed.to(out.dtype)), (sums, total), (shifts, shift)]
        for whole, part in parts:
            if whole is not None:
                group.put(whole, step.images, part)
    return out, sums, shifts


def _backward(grad, saved, groups, hw, scale, extra, p, seed, dtype):
    """Gradients of q, k and v; those of the tables gather in the groups' blocks."""
    q, k, v, out, sums, shifts = saved
    dropout = _Dropout(p, seed, q.device)
    results = [torch.empty_like(x, dtype=dtype) for x in (q, k, v)]
    for group, step in _steps(groups, q, k, v, hw, extra, dtype):
        # g' = g / rowsum and D = rowsum(g' * out)
        g = step.take(grad).to(dtype) / step.take(sums)
        dot = (g * step.take(out)).sum(-1, keepdim=True)
        shift = None if shifts is None else step.take(shifts)
        dq, dk, dv = (torch.zeros_like(x) for x in (step.q, step.k, step.v))
        for tile in group.tiles:
            queries, (keys, values) = step.rows(step.q, tile), step.near(tile)
            g_rows = step.rows(g, tile)
            s, e, d = (step.room(i, queries, keys) for i in range(3))
            _multiply(queries, keys.transpose(1, 2), s, scale)
            group.logits(s, tile, e)
            if shift is not None:
                e.sub_(step.rows(shift, tile).view(*step.shape, -1, 1))
            exp_(e, deep=True)
            _multiply(g_rows, values.transpose(1, 2), d)
            weights = e
            if p:
                weights = dropout.fill(torch.empty_like(e))
                d.mul_(weights)
                weights.mul_(e)
            step.add_near(dv, tile, weights.flatten(0, 1).transpose(1, 2) @ g_rows)
            d.sub_(step.rows(dot, tile).view(*step.shape, -1, 1)).mul_(e)
            group.beta.add_grad(tile, d.sum(0))
            if group.omega is not None:
                group.omega.add_grad(tile, s.mul_(d).sum(0))
                d.mul_(group.omega.at(tile))
            d.mul_(scale)
            flat = d.flatten(0, 1)
            step.put(dq, tile, torch.bmm(flat, keys))
            step.add_near(dk, tile, torch.bmm(flat.transpose(1, 2), queries))
        for result, part in zip(results, (dq, dk, dv), strict=True):
            group.put(result, step.images, part)
    return [result.to(x.dtype) for result, x in zip(results, (q, k, v), strict=True)]


def _table_grad(table: Tensor, blocks: list, heads: int) -> Tensor:
    """The gradient of a table (heads or 1, ..) from the blocks of all groups."""
    grad = table.new_zeros(heads, *table.shape[1:], dtype=blocks[0][1].grad.dtype)
    for own, block in blocks:
        grad[own] = block.table_grad()
    if table.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    return grad.to(table.dtype)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prior, bias, keep, groups, *settings):
        hw, _, extra, *_, dtype = settings
        tables = (prior, bias, keep)
        ctx.groups = [
            _Group(own, reach, tables, hw, extra, dtype) for own, reach in groups
        ]
        ctx.settings = settings
        result = _forward(q, k, v, ctx.groups, *settings)
        ctx.save_for_backward(q, k, v, *result, prior, bias)
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *saved, prior, bias = ctx.saved_tensors
        for group in ctx.groups:
            for block in (group.beta, group.omega):
                if block is not None:
                    block.grad = None
        grads = _backward(grad, saved, ctx.groups, *ctx.settings)
        heads = saved[0].shape[1]
        of_tables = [None, None]
        if ctx.needs_input_grad[3]:
            blocks = [(group.heads, group.omega) for group in ctx.groups]
            of_tables[0] = _table_grad(prior, blocks, heads)
        if ctx.needs_input_grad[4]:
            blocks = [(group.heads, group.beta) for group in ctx.groups]
            of_tables[1] = _table_grad(bias, blocks, heads)
        return *grads, *of_tables, None, None, *[None] * len(ctx.settings)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prior: Optional[Tensor],
    bias: Optional[Tensor],
    keep: Tensor,
    hw: tuple[int, int],
    scale: float,
    num_extra_tokens: int,
    dropout_p: float,
) -> Tensor:
    """``softmax(omega * (q k^T * scale) + beta) v`` over the offsets that are kept.

    Half-precision inputs are computed in float32, tile by tile, and rounded once at the
    end. Differentiable once with respect to q, k, v and the two tables; the backward
    pass repeats the dropout masks from a seed drawn here. Arguments as in
    :func:`~spvit_mm.ops.spatial_prior_attention`, already checked, and ``keep`` given.
    """
    extra, hw = num_extra_tokens, tuple(hw)
    found = reaches(keep, hw)
    found = found * q.shape[1] if len(found) == 1 else found
    bands, tiles = costs(found, hw, extra)
    if bands <= tiles:
        bias = mask_bias(bias, keep)
        return chunked_attention(q, k, v, prior, bias, hw, scale, 0, dropout_p, found)
    seed = int(torch.randint(1 << 62, ()).item()) if dropout_p else None
    dtype = compute_dtype(q.dtype)
    settings = (hw, scale, extra, dropout_p, seed, dtype)
    groups = group_heads(found, hw)
    out = _LocalAttention.apply(
        q[:, :, extra:], k, v, prior, bias, keep, groups, *settings
    )
    if not extra:
        return out
    # Extra tokens have no place, so they see all keys.
    whole = F.scaled_dot_product_attention(
        q[:, :, :extra], k, v, dropout_p=dropout_p, scale=scale
    )
    return torch.cat((whole, out), dim=2)
