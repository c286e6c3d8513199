"""Binarised priors, the paper's outlook: every head keeps some offsets, no more.

Which ones, the prior ranks that multiplies the scores or, where there is none, the one
that is added to them; with both, the one that is added is kept but ranks nothing.
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from ..models import SpatialPriorAttention
from ..ops import check_keep, expand_prior, spatial_prior_attention
from ..utils import UserError
from .recording import record_attention

CRITERIA = ('offsets', 'mass')


class BinarizedAttention(nn.Module):
    """Attention with spatial priors over the offsets that are kept; the others are masked.

    It takes the place of the attention that it holds, in a model that is
    measured or fine-tuned.

    Args:
        attn (SpatialPriorAttention): The attention; its parameters stay its own.
        keep (Tensor): (heads, 2H-1, 2W-1), bool, with the zero offset. What the prior
            itself masks is never kept.
        hw (Tuple[int, int]): The grid (H, W) of ``keep``, the only one taken.
        ones (bool): Whether the kept offsets take prior 1, which is neutral, in place
            of what was learned. Defaults to False.
        impl (str): The kernel, see
            :func:`~spvit_mm.ops.spatial_prior_attention`; 'dense' is another name
            of 'eager' and 'block' of 'flex', whose BlockMask alone skips what is
            masked. Defaults to 'auto'.

    Raises:
        ValueError: If ``keep`` is no such table.
    """

    def __init__(self, attn, keep, hw, ones=False, impl='auto'):
        super().__init__()
        check_keep(keep, hw)
        self.attn = attn
        self.register_buffer('keep', keep)
        self.hw = tuple(hw)
        self.ones = ones
        self.attn_impl = {'dense': 'eager', 'block': 'flex'}.get(impl, impl)

    def forward(self, x, hw_shape, omega=None, rescale=None):
        if tuple(hw_shape) != self.hw:
            raise UserError(
                f'The masks are for a grid of {self.hw[0]} x {self.hw[1]} patches, and '
                f'the image has {hw_shape[0]} x {hw_shape[1]}. Binarise for that grid.'
            )
        attn = self.attn
        prior, bias, visible = attn.score_tables(hw_shape, x.device, omega, rescale)
        if self.ones:
            prior = bias = None
        q, k, v = attn.project_qkv(x, hw_shape)
        out = spatial_prior_attention(
            q,
            k,
            v,
            prior,
            hw_shape,
            bias=bias,
            keep=self.keep if visible is None else self.keep & visible,
            scale=attn.scale,
            num_extra_tokens=attn.num_extra_tokens,
            dropout_p=attn.attn_drop if self.training else 0.0,
            attn_impl=self.attn_impl,
        )
        return attn.merge_heads(out, v)


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

    Args:
        model (nn.Module): An image classifier or backbone.
        batches (Iterable[Tensor]): Normalized images (B, 3, h, w) of one size.

    Returns:
        Tuple[Dict[str, OffsetMass], Tuple[int, int]]: One of each layer, by the
        name of its attention, and the grid.

    Raises:
        UserError: If there is no SP-SA layer, or images differ in size.
    """
    masses, tables, grid = {}, {}, None
    with record_attention(model) as recording:
        for images in batches:
            model(images)
            if grid not in (None, recording.grid):
                raise UserError('All images must have one size to be binarised for.')
            grid = recording.grid
            for m in recording.maps:
                attn = model.get_submodule(m.name)
                if m.position is None or not isinstance(attn, SpatialPriorAttention):
                    continue
                extra = m.weights.shape[-1] - grid[0] * grid[1]
                pairs = m.weights[:, :, extra:, extra:].sum(0)
                masses[m.name] = masses.get(m.name, 0) + fold_pairs(pairs, grid)
                ranks = m.position
                if m.keep is not None:
                    ranks = ranks.masked_fill(~m.keep, float('-inf'))
                tables[m.name] = pick_offsets(ranks[0, :, extra:, extra:], grid)
    if not masses:
        raise UserError(
            f'{type(model).__name__} has no SP-SA layer, or no image was given: there '
            'is no prior to binarise.'
        )
    return {
        name: OffsetMass(tables[name], mass / mass.sum((1, 2), keepdim=True))
        for name, mass in masses.items()
    }, grid


def _offset_index(hw, device):
    """The flat table index of every pair, (N, N)."""
    size = (2 * hw[0] - 1, 2 * hw[1] - 1)
    index = torch.arange(size[0] * size[1], device=device)
    return expand_prior(index.view(1, *size), hw)[0]


def fold_pairs(pairs, hw):
    """Sum a value of all pairs (heads, N, N) by offset: (heads, 2H-1, 2W-1)."""
    size = (2 * hw[0] - 1, 2 * hw[1] - 1)
    table = pairs.new_zeros(len(pairs), size[0] * size[1])
    index = _offset_index(hw, pairs.device).flatten()
    return table.index_add(1, index, pairs.flatten(1)).unflatten(1, size)


def pick_offsets(pairs, hw):
    """The table of a value (heads, N, N) that depends on the offset alone."""
    size = (2 * hw[0] - 1, 2 * hw[1] - 1)
    table = pairs.new_zeros(len(pairs), size[0] * size[1])
    table[:, _offset_index(hw, pairs.device).flatten()] = pairs.flatten(1)
    return table.unflatten(1, size)


def keep_offsets(table, mass, share, by='offsets'):
    """Which offsets a head keeps: those of the largest prior.

    From the largest on, offsets are taken until they make up ``share`` of all
    offsets that the prior does not mask, or of the attention mass. The zero offset is
    always kept, so that no query is left without a key.

    Args:
        table (Tensor): What ranks them, as of :class:`OffsetMass`, (heads, 2H-1, 2W-1).
        mass (Tensor): The attention's mass by offset, of the same shape and sum
            1 a head.
        share (float): In (0, 1].
        by (str): 'offsets' or 'mass'. Defaults to 'offsets'.

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
    order = table.flatten(1).argsort(dim=1, descending=True, stable=True)
    if by == 'offsets':
        taken = visible.flatten(1).to(table).gather(1, order)
        taken = taken / taken.sum(dim=1, keepdim=True)
    else:
        taken = mass.flatten(1).to(table).gather(1, order)
    # An offset is taken while those before it have not reached the share.
    before = taken.double().cumsum(1) - taken.double()
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(1, order, before < share - 1e-9)
    keep = keep.view_as(table) & visible
    keep[:, table.shape[1] // 2, table.shape[2] // 2] = True
    return keep


def binarize(model, masses, hw, share, by='offsets', ones=False, impl='auto'):
    """Binarise every layer of a model that was measured, in place.

    Args:
        model (nn.Module): The model that ``masses`` was measured on.
        masses (Dict[str, OffsetMass]): Of :func:`offset_mass`.
        hw (Tuple[int, int]): The grid (H, W).
        share (float): See :func:`keep_offsets`.
        by (str): See :func:`keep_offsets`. Defaults to 'offsets'.
        ones (bool): Whether kept offsets take prior 1. Defaults to False.
        impl (str): As of :class:`BinarizedAttention`. Defaults to 'auto'.

    Returns:
        Tuple[float, float]: The shares of offsets and of attention mass that
        are kept, means over layers and heads.
    """
    offsets, kept_mass = [], []
    for name, (table, mass) in masses.items():
        attn = model.get_submodule(name)
        if not isinstance(attn, SpatialPriorAttention):
            raise ValueError(f'{name} is no SpatialPriorAttention: binarised before?')
        keep = keep_offsets(table, mass, share, by)
        parent, _, child = name.rpartition('.')
        layer = BinarizedAttention(attn, keep, hw, ones, impl).train(attn.training)
        setattr(model.get_submodule(parent), child, layer)
        offsets.append(keep.double().mean())
        kept_mass.append((mass * keep).sum((1, 2)).double().mean())
    return float(torch.stack(offsets).mean()), float(torch.stack(kept_mass).mean())
