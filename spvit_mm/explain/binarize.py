"""Binarised priors, the paper's outlook: every head keeps some offsets, no more.

Which ones, the attention on images says, or the prior, known before any image: the one
that multiplies the scores or, where there is none, the one that is added to them; with
both, the one that is added is kept but ranks nothing.
"""

from contextlib import ExitStack
from typing import NamedTuple

import torch

from ..models import SpatialPriorAttention
from ..ops.local import TILE, local_cost
from ..ops.prior import mask_bias
from ..utils import UserError

# Ranked by the prior, and by the attention itself.
CRITERIA = ('offsets', 'mass', 'fewest', 'window')


class OffsetMass(NamedTuple):
    """Where a layer's attention lies on average.

    Attributes:
        table (Tensor): What ranks the offsets, (heads, 2H-1, 2W-1): the prior that
            multiplies the scores or, where none does, what is added to them; minus
            infinity where the prior masks.
        mass (Tensor): The attention between patches by their offset, (heads,
            2H-1, 2W-1), each head of sum 1.
    """

    table: torch.Tensor
    mass: torch.Tensor


@torch.no_grad()
def offset_mass(model, batches):
    """Measure the attention of every layer with spatial priors by offset.

    The mass of an offset is the attention that all pairs of patches at that offset get,
    over all queries and images: a far offset, of which a grid has few pairs, has a small
    one. What goes to extra tokens is left out. The attention is computed row by row of
    the grid, so memory grows as for one row.

    Args:
        model (nn.Module): A model that holds SpatialPriorAttention, in eval mode.
        batches (Iterable[Tensor]): Normalized images (B, 3, h, w) of one size.

    Returns:
        Tuple[Dict[str, OffsetMass], Tuple[int, int]]: One of each layer, by the
        name of its attention, and the grid.

    Raises:
        UserError: If there is no SP-SA layer, or images differ in size.
    """
    masses, tables, grids = {}, {}, []

    def measure(name, attn, x, hw_shape, omega=None, rescale=None):
        hw = tuple(int(side) for side in hw_shape)
        prior, bias, keep = attn.score_tables(hw, x.device, omega, rescale)
        ranks = bias if prior is None else prior
        if ranks is None:  # no prior
            return
        if hw not in grids:
            grids.append(hw)
        if len(grids) > 1:
            sizes = ' and '.join(f'{height} x {width}' for height, width in grids)
            raise UserError(
                'All images must have one size to be binarised for; these make grids '
                f'of {sizes} patches.'
            )
        if keep is not None:
            ranks = ranks.masked_fill(~keep, float('-inf'))
        tables[name] = ranks.expand(attn.num_heads, -1, -1)
        mass = _attention_by_offset(attn, x, hw, prior, mask_bias(bias, keep))
        masses[name] = masses.get(name, 0) + mass

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, SpatialPriorAttention):

                def hook(attn, args, kwargs, name=name):
                    measure(name, attn, *args, **kwargs)

                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for images in batches:
            model(images)
            if not masses:
                break
    if not masses:
        raise UserError(
            f'{type(model).__name__} has no SP-SA layer, or no image was given: there '
            'is no prior to binarise.'
        )
    return {
        name: OffsetMass(tables[name], mass / mass.sum((1, 2), keepdim=True))
        for name, mass in masses.items()
    }, grids[0]


def _attention_by_offset(attn, x, hw, prior, beta):
    """The attention between patches, summed by offset: (heads, 2H-1, 2W-1), float64."""
    (height, width), extra = hw, attn.num_extra_tokens
    q, k, _ = attn.project_qkv(x, hw)
    axis = torch.arange(width, device=x.device)
    rows = torch.arange(height, device=x.device).view(-1, 1) * (2 * width - 1)
    # Where the table holds a query's pairs, if its row's began at the table's top.
    index = axis - axis.view(-1, 1, 1) + width - 1 + rows  # (W, H, W)
    mass = q.new_zeros(attn.num_heads, (2 * height - 1) * (2 * width - 1)).double()
    for y in range(height):
        first = extra + y * width
        scores = q[:, :, first : first + width] * attn.scale @ k.transpose(-2, -1)
        pairs = scores[..., extra:]
        if prior is not None:
            pairs = pairs * _row_pairs(prior, y, hw)
        if beta is not None:
            pairs = pairs + _row_pairs(beta, y, hw)
        weights = torch.cat((scores[..., :extra].to(pairs), pairs), -1).softmax(-1)
        weights = weights[..., extra:].double().sum(0).flatten(1)
        top = (height - 1 - y) * (2 * width - 1)
        mass.index_add_(1, (index + top).flatten(), weights)
    return mass.view(-1, 2 * height - 1, 2 * width - 1)


def _row_pairs(table, y, hw):
    """A table's values for the queries of row y: (heads, W, N)."""
    height, width = hw
    near = table[:, height - 1 - y : 2 * height - 1 - y]
    near = near.unfold(2, width, 1).flip(2)  # (heads, H, W queries, W)
    return near.transpose(1, 2).flatten(2)


def keep_offsets(table, mass, share, by='offsets'):
    """Which offsets a head keeps.

    The zero offset is always kept, so that no query is left without a key, and none
    that the prior masks. ``by`` says which others, and what they make up:

    - 'offsets': those of the largest prior, ``share`` of all offsets.
    - 'mass': those of the largest prior, until they hold ``share`` of the attention.
    - 'fewest': those of the most attention: the fewest that hold ``share`` of it.
    - 'window': all of one rectangle that holds ``share`` of the attention: that with
      the fewest keys for a tile of queries, which is what ``attn_impl='local'``
      computes.

    Args:
        table (Tensor): What ranks them, as of :class:`OffsetMass`, (heads, 2H-1, 2W-1).
        mass (Tensor): The attention's mass by offset, of the same shape and sum
            1 a head.
        share (float): In (0, 1].
        by (str): One of ``CRITERIA``. Defaults to 'offsets'.

    Returns:
        Tensor: (heads, 2H-1, 2W-1), bool.

    Raises:
        ValueError: If ``share`` or ``by`` is none of these.
    """
    if not 0 < share <= 1:
        raise ValueError(f'`share` must lie in (0, 1], got {share}.')
    if by not in CRITERIA:
        raise ValueError(f'`by` must be one of {CRITERIA}, got {by!r}.')
    visible = table > float('-inf')
    if share == 1:
        return visible
    if by == 'window':
        return _smallest_window(mass, share) & visible
    middle = table.shape[1] // 2, table.shape[2] // 2
    ranks = table
    if by == 'fewest':
        ranks = mass.masked_fill(~visible, float('-inf'))
        # First, or one offset too many could be taken before it.
        ranks[:, middle[0], middle[1]] = float('inf')
    order = ranks.flatten(1).argsort(dim=1, descending=True, stable=True)
    taken = visible if by == 'offsets' else mass
    taken = taken.double().flatten(1).gather(1, order)
    taken = taken / taken.sum(dim=1, keepdim=True)
    # An offset is taken while those before it have not reached the share.
    before = taken.cumsum(1) - taken
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(1, order, before < share - 1e-9)
    keep = keep.view_as(table) & visible
    keep[:, middle[0], middle[1]] = True
    return keep


def _smallest_window(mass, share):
    """For each head the rectangle of :func:`keep_offsets`, around the zero offset."""
    heads, height, width = len(mass), *((side + 1) // 2 for side in mass.shape[1:])
    mass = mass.double() / mass.double().sum((1, 2), keepdim=True)
    # Sums of all columns left of each column and of all rows above each row.
    total = torch.nn.functional.pad(mass.cumsum(1).cumsum(2), (1, 0, 1, 0))
    dy = torch.arange(height, device=mass.device)
    dx = torch.arange(width, device=mass.device)
    best = torch.full((heads,), float('inf'), device=mass.device)
    sides = torch.zeros(heads, 4, dtype=torch.long, device=mass.device)
    for up in range(height):
        # Of the rows from `up` to each `down`, the mass left of each column.
        part = total[:, height:] - total[:, height - 1 - up, None]  # (heads, H, 2W)
        wanted = part[..., :width] + share - 1e-9  # from each `left`, W-1 patches first
        end = torch.searchsorted(part.contiguous(), wanted.contiguous())
        right = (end - width).clamp(min=0)
        rows = (min(TILE, height) + up + dy).clamp(max=height).view(-1, 1)
        cols = min(TILE, width) + dx.flip(0) + right
        cost = rows * cols.clamp(max=width)
        # Of those alike, the smallest.
        area = (up + dy + 1).view(-1, 1) * (dx.flip(0) + right + 1)
        cost = cost + area / (4.0 * height * width)
        cost = cost.masked_fill(end >= part.shape[-1], float('inf')).flatten(1)
        least, where = cost.min(1)
        down, left = where // width, width - 1 - where % width
        found = right.flatten(1).gather(1, where[:, None])[:, 0]
        found = torch.stack((torch.full_like(down, up), down, left, found), 1)
        sides = torch.where((least < best)[:, None], found, sides)
        best = torch.minimum(best, least)
    up, down, left, right = sides.view(heads, 4, 1, 1).unbind(1)
    row = torch.arange(1 - height, height, device=mass.device).view(-1, 1)
    col = torch.arange(1 - width, width, device=mass.device)
    return (row >= -up) & (row <= down) & (col >= -left) & (col <= right)


class Kept(NamedTuple):
    """What a layer keeps.

    Attributes:
        name (str): The name of its attention.
        keep (Tensor): (heads, 2H-1, 2W-1), bool.
        pairs (Tensor): The share of all pairs of patches that each head keeps, (heads,).
        mass (Tensor): The share of the attention, (heads,).
        computed (float): What ``attn_impl='local'`` costs on the CPU, as a share of all
            pairs.
    """

    name: str
    keep: torch.Tensor
    pairs: torch.Tensor
    mass: torch.Tensor
    computed: float


def sparsify(model, masses, share, by='fewest', ones=False):
    """Mask in every layer of a model that was measured what it does not need, in place.

    Args:
        model (nn.Module): The model that ``masses`` was measured on.
        masses (Dict[str, OffsetMass]): Of :func:`offset_mass`.
        share (float): See :func:`keep_offsets`.
        by (str): See :func:`keep_offsets`. Defaults to 'fewest'.
        ones (bool): Whether the kept offsets take prior 1, which is neutral, in place
            of what was learned. Defaults to False.

    Returns:
        List[Kept]: One of each layer.

    Raises:
        ValueError: If ``share`` or ``by`` is not accepted.
    """
    found = []
    for name, (table, mass) in masses.items():
        keep = keep_offsets(table, mass, share, by)
        attn = model.get_submodule(name)
        attn.set_kept(keep)
        if ones:
            attn.combine, attn.strength = 'add', 0.0
        found.append(describe_kept(name, keep, mass, attn.num_extra_tokens))
    return found


def describe_kept(name, keep, mass, num_extra_tokens):
    """Say what a layer keeps.

    Args:
        name (str): The name of its attention.
        keep (Tensor): (heads, 2H-1, 2W-1), bool.
        mass (Tensor): The attention by offset, of the same shape, each head of sum 1.
        num_extra_tokens (int): Tokens of the layer that are no patches.

    Returns:
        Kept: See there.
    """
    hw = tuple((side + 1) // 2 for side in keep.shape[1:])
    rows, cols = (side - torch.arange(1 - side, side).abs() for side in hw)
    pairs = (rows[:, None] * cols).to(mass) / (hw[0] * hw[1]) ** 2
    pairs, mass = ((value * keep).sum((1, 2)).cpu() for value in (pairs, mass))
    computed = local_cost(keep, hw, num_extra_tokens)
    return Kept(name, keep.cpu(), pairs, mass, computed)


def mean_kept(kept):
    """Means over layers and heads of what is kept.

    Args:
        kept (List[Kept]): Of each layer.

    Returns:
        Tuple[float, float, float]: The shares of the offsets, of the pairs of patches,
        and of the attention between them.
    """
    return tuple(
        float(torch.stack([value.double().mean() for value in values]).mean())
        for values in zip(*((x.keep, x.pairs, x.mass) for x in kept), strict=True)
    )
