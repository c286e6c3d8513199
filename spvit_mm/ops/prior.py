"""From the distinct offsets of a grid to the prior of every pair, and back.

A spatial prior depends on a pair of tokens only through their offset, so a grid
of ``H x W`` tokens has ``(2H-1)(2W-1)`` values per head (the *table*) and not
``(H*W)^2``. The two shapes are related by

    omega[h, i, j] = table[h, y_j - y_i + H - 1, x_j - x_i + W - 1]

with ``i = y_i * W + x_i`` the query and ``j`` the key (SP-ViT, arXiv
2206.07662, eq. 4, where the prior is a function of the offset alone).

With the keys in reverse order, ``j' = N - 1 - j``, and the table turned by half a
turn, the indices add up where they were subtracted,

    omega[h, i, j'] = turned[h, y_i + y_j', x_i + x_j']

so that the priors of successive queries are windows that move on by one. The *strip*
is turned's windows along x, and the prior of all pairs the windows of a strip,

    strip[h, x_i, a * W + x_j'] = turned[h, a, x_i + x_j']
    omega[h, y_i * W + x_i]     = strip[h, x_i, y_i * W : y_i * W + N]

a view with contiguous rows: the blocked kernel never writes the prior of all pairs,
and takes that of many queries in one step.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .compat import compute_dtype, is_free


def check_table(table: Tensor, hw: tuple[int, int], name: str = 'table') -> None:
    """Refuse a table that does not belong to the grid.

    Args:
        table (Tensor): What should be ``(heads, 2H-1, 2W-1)``.
        hw (tuple[int, int]): Rows and columns of the grid.
        name (str): How the message calls the table. Defaults to 'table'.

    Raises:
        ValueError: The grid is empty, or the table has another shape.
    """
    height, width = hw
    if height < 1 or width < 1:
        raise ValueError(f'`hw` must hold two positive numbers, but got {tuple(hw)}.')
    want = (2 * height - 1, 2 * width - 1)
    if table.dim() != 3 or tuple(table.shape[1:]) != want:
        raise ValueError(
            f'`{name}` must have the shape (heads, 2H-1, 2W-1) = (heads, {want[0]}, '
            f'{want[1]}) for the grid hw=({height}, {width}), but got '
            f'{tuple(table.shape)}. Compute it for this grid, or pass its own grid.'
        )


def check_keep(keep: Tensor, hw: tuple[int, int], values: bool = True) -> None:
    """Refuse a table of kept offsets that could leave a query without any key.

    Args:
        keep (Tensor): What should be ``(heads, 2H-1, 2W-1)``, bool.
        hw (tuple[int, int]): Rows and columns of the grid.
        values (bool): Whether to look at the zero offset's. Defaults to True.

    Raises:
        ValueError: It has another shape or dtype, or leaves out the zero offset.
    """
    check_table(keep, hw, 'keep')
    if keep.dtype != torch.bool:
        raise ValueError(f'`keep` must be bool, but got {keep.dtype}.')
    if values and not keep[:, hw[0] - 1, hw[1] - 1].all():
        raise ValueError(
            '`keep` must keep the zero offset of every head, or a query could be left '
            'without any key.'
        )


def mask_bias(bias: Optional[Tensor], keep: Optional[Tensor]) -> Optional[Tensor]:
    """The bias with minus infinity where an offset is not kept.

    Args:
        bias (Tensor, optional): ``(heads or 1, 2H-1, 2W-1)``; None is 0.
        keep (Tensor, optional): ``(heads or 1, 2H-1, 2W-1)``, bool; None keeps all.

    Returns:
        Tensor | None: ``(heads or 1, 2H-1, 2W-1)``, float32 at least.
    """
    if keep is None:
        return bias
    if bias is None:
        bias = keep.new_zeros((), dtype=torch.float32)
    bias = bias.to(compute_dtype(bias.dtype))
    return torch.where(keep, bias, torch.full_like(bias, float('-inf')))


def expand_prior(table: Tensor, hw: tuple[int, int]) -> Tensor:
    """The prior of every pair of tokens from its value at every offset.

    Two sliding windows over the table give all pairs as a view, with the queries
    in reverse order; one flip puts them right. No index tensor is made.

    Args:
        table (Tensor): ``(heads, 2H-1, 2W-1)``; ``table[h, dy + H-1, dx + W-1]``
            is the prior of head ``h`` for the offset ``(dx, dy)``, in tokens,
            of the key from the query (right and down positive).
        hw (tuple[int, int]): Rows and columns ``(H, W)`` of the grid.

    Returns:
        Tensor: ``omega``, ``(heads, N, N)`` with ``N = H * W`` in row-major
        order, queries first; differentiable with respect to the table.

    Raises:
        ValueError: The table's shape does not belong to the grid.
    """
    check_table(table, hw)
    return expand_pairs(table, hw)


def expand_pairs(table: Tensor, hw: tuple[int, int]) -> Tensor:
    """:func:`expand_prior` for a table that was checked."""
    height, width = hw
    tokens = height * width
    if is_free(hw):  # there are no windows of a side that is not known
        dy, dx = all_offsets(hw, table.device)
        return table[:, dy, dx]
    pairs = table.unfold(1, height, 1).unfold(2, width, 1)  # (heads, H, W, H, W)
    return pairs.flip(1, 2).reshape(-1, tokens, tokens)


def all_offsets(hw: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column where a table holds the value of each pair, both (N, N).

    As :func:`pair_offsets` of all grid tokens, without a remainder, of which ONNX has
    none for a width that is not known.
    """
    height, width = hw
    y = torch.arange(height, device=device)[:, None].expand(hw).flatten()
    x = torch.arange(width, device=device).expand(hw).flatten()
    return y - y[:, None] + (height - 1), x - x[:, None] + (width - 1)


def expand_columns(table: Tensor, hw: tuple[int, int]) -> Tensor:
    """The strip ``(heads, W, (2H-1) * W)`` of a table; see the module's text."""
    height, width = hw
    turned = table.flip(1, 2).unfold(2, width, 1)  # (heads, 2H-1, W, W)
    return turned.transpose(1, 2).reshape(-1, width, (2 * height - 1) * width)


def fold_columns(strip: Tensor, hw: tuple[int, int]) -> Tensor:
    """The adjoint of :func:`expand_columns`: sums a strip back to its table."""
    height, width = hw
    strip = strip.view(-1, width, 2 * height - 1, width)
    turned = strip.new_zeros(strip.shape[0], 2 * height - 1, 2 * width - 1)
    for x in range(width):
        turned[:, :, x : x + width].add_(strip[:, x])
    return turned.flip(1, 2)


def windows(strip: Tensor, hw: tuple[int, int]) -> Tensor:
    """The values of all pairs, keys in reverse order: a view ``(heads, H, W, H * W)``.

    The windows of two rows of the grid, ``[:, y]``, overlap.
    """
    height, width = hw
    return strip.unfold(2, height * width, width).transpose(1, 2)


def pair_offsets(i: Tensor, j: Tensor, hw: tuple[int, int], num_extra_tokens: int):
    """Where a table holds the values of queries ``i`` and keys ``j``.

    Args:
        i (Tensor): Numbers of tokens, the extra ones counted; any shape.
        j (Tensor): The same of the keys; the shapes broadcast.
        hw (tuple[int, int]): Rows and columns ``(H, W)`` of the grid.
        num_extra_tokens (int): Tokens in front of the grid's.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Row ``dy + H-1`` and column ``dx + W-1`` of the
        table, and whether an extra token is in the pair; then row and column point
        somewhere inside the table, and mean nothing.
    """
    height, width = hw
    extra = (i < num_extra_tokens) | (j < num_extra_tokens)
    i = (i - num_extra_tokens).clamp(min=0)
    j = (j - num_extra_tokens).clamp(min=0)
    dy = j // width - i // width + height - 1
    dx = j % width - i % width + width - 1
    return dy, dx, extra
