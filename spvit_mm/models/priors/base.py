"""Spatial relation functions: relative patch coordinates -> 2D spatial priors.

Paper: "SP-ViT: Learning 2D Spatial Priors for Vision Transformers", BMVC 2022,
https://arxiv.org/abs/2206.07662

A prior is a function of the offset between two patches alone. On a grid of
H x W patches there are (2H-1)(2W-1) distinct offsets, so a prior is a table of
that size per head; the N x N prior of the paper is that table read N times.
"""

from functools import lru_cache
from itertools import chain

import torch
from mmengine.model import BaseModule

from ...ops import expand_prior
from ...ops.compat import is_traced, no_autocast
from ...utils import CheckpointError
from ..checks import check_choice, check_int


def _make_offsets(hw, device):
    height, width = hw
    dy = torch.arange(1 - height, height, dtype=torch.float32, device=device)
    dx = torch.arange(1 - width, width, dtype=torch.float32, device=device)
    dy, dx = torch.meshgrid(dy, dx, indexing='ij')
    return torch.stack((dx, dy), dim=-1)


@lru_cache(maxsize=64)
def _cached_offsets(hw, device):
    # A tensor born in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return _make_offsets(hw, device)


def relative_offsets(hw, device='cpu'):
    """All distinct relative coordinates of a grid, in patch units.

    Args:
        hw (Tuple[int, int]): The grid (H, W).
        device (torch.device | str): Where the result lives.

    Returns:
        Tensor: (2H-1, 2W-1, 2), float32. Entry [i, j] is the offset
        r = (x_key - x_query, y_key - y_query) = (j - (W-1), i - (H-1)),
        positive to the right and downwards.

    Raises:
        ValueError: If H or W is smaller than 1.
    """
    height, width = hw
    if height < 1 or width < 1:
        raise ValueError(f'`hw` must be a grid of at least 1 x 1 patches, got {hw}.')
    if is_traced():
        # A compiled graph folds them itself, and must hold no tensor of ours.
        return _make_offsets((height, width), device)
    # A copy: whoever writes to it changes no other prior of this grid.
    return _cached_offsets((int(height), int(width)), torch.device(device)).clone()


COORDS = ('raw', 'scaled', 'clamped', 'log', 'swinv2')
# Those that count patches, as a table, a window or an angle needs it.
PATCH_COORDS = ('raw', 'scaled', 'clamped')
# Those that have to know the grid of the training.
COORDS_OF_A_GRID = ('scaled', 'clamped', 'swinv2')


def place_offsets(offsets, hw, train_grid, coords):
    """What a spatial relation sees of the offsets of a grid.

    Args:
        offsets (Tensor): (.., 2), relative coordinates (x, y) in patches.
        hw (Tuple[int, int]): The grid (H, W) that they belong to.
        train_grid (Tensor, optional): The grid (H, W) of the training, for those of
            ``COORDS_OF_A_GRID``.
        coords (str): One of ``COORDS``, see :class:`SpatialPrior`.

    Returns:
        Tensor: (.., 2).
    """
    if coords == 'raw':
        return offsets
    if coords == 'log':
        return offsets.sign() * offsets.abs().log1p()
    # x belongs to the width, so the grid is read in reverse order.
    train_grid = train_grid.flip(0).to(offsets)
    if coords == 'scaled':
        sides = torch.stack([offsets.new_full((), side) for side in (hw[1], hw[0])])
        return offsets * (train_grid / sides)
    far = train_grid - 1
    if coords == 'clamped':
        return torch.maximum(torch.minimum(offsets, far), -far)
    spread = offsets * (8 / far.clamp(min=1))
    return spread.sign() * (1 + spread.abs()).log2() / 3


class SpatialPrior(BaseModule):
    """Base class of the spatial relation functions.

    A subclass writes :meth:`relation`, the function of the offset, and is a
    complete prior for every grid. Its values are computed in float32 (float64
    in a float64 model), also under mixed precision. The value 1 is neutral,
    whether an attention multiplies or adds it (``combine`` of
    :class:`SpatialPriorAttention`).

    Args:
        num_heads (int): Number of priors: one per attention head, or 1 for
            one that all heads share.
        grid (Tuple[int, int], optional): The grid of patches at training, in
            (H, W). SPViT passes its own. Defaults to None.
        coords (str): What a relation sees of an offset r:

            - ``'raw'``: r in patches, as in the released models.
            - ``'scaled'``: r times training grid / grid, so that an image's border
              stays where it was.
            - ``'clamped'``: r in patches, none further than those of the training
              grid.
            - ``'log'``: ``sign(r) log(1 + |r|)`` for each axis: far offsets of a larger
              grid lie close to those of the training.
            - ``'swinv2'``: the same of r / (training grid - 1) * 8, with log2 and
              divided by log2(8), as Swin Transformer V2 has it
              (https://arxiv.org/abs/2111.09883, eq. 4).

            On the training grid the first three are the same. ``'scaled'``,
            ``'clamped'`` and ``'swinv2'`` keep the training grid in a buffer, so a
            checkpoint remembers it. Defaults to 'raw'.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    COORDS = COORDS
    # Whether its values are those of a bias, which make no sense as a factor.
    is_bias = False

    def __init__(self, num_heads, grid=None, coords='raw', init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        num_heads = check_int('num_heads', num_heads, 1)
        check_choice('coords', coords, self.COORDS)
        if coords in COORDS_OF_A_GRID and grid is None:
            raise ValueError(
                f'`coords={coords!r}` needs `grid`, the (H, W) of the training grid.'
            )
        self.num_heads = num_heads
        self.grid = None if grid is None else tuple(grid)
        self.coords = coords
        if coords in COORDS_OF_A_GRID:
            self.register_buffer('train_grid', torch.tensor(self.grid))

    def relation(self, offsets):
        """The spatial relation function f.

        Args:
            offsets (Tensor): (M, 2), relative coordinates (x, y) in patches.

        Returns:
            Tensor: (num_heads, M), the prior of each head at each offset.
        """
        raise NotImplementedError

    def visible(self, offsets):
        """Which offsets take part in the attention at all.

        Args:
            offsets (Tensor): (M, 2), relative coordinates (x, y) in patches.

        Returns:
            Tensor | None: (num_heads, M), bool, True at the offset (0, 0); a pair
            that is not visible gets the score minus infinity. None, the default:
            all are.
        """
        return None

    def set_depth(self, layer, num_layers):
        """Told by the backbone: the layer's index and the number of layers."""

    def _anchor(self):
        """A tensor that tells device and dtype; None if there is nothing."""
        return next(chain(self.parameters(), self.buffers()), None)

    def forward(self, hw, device=None, rescale=None):
        """Evaluate the prior on the distinct offsets of a grid.

        Args:
            hw (Tuple[int, int]): The grid (H, W), each at least 1.
            device (torch.device, optional): Where to compute, for a prior
                without parameters. Defaults to the parameters' device.
            rescale (Tensor, optional): (2,), factors of x and y, see
                ``coords_rescale`` of :class:`SPViT`. Defaults to None.

        Returns:
            Tensor: The table (num_heads, 2H-1, 2W-1); entry
            [h, dy + H-1, dx + W-1] is f_h((dx, dy)).
        """
        return self._table(self.relation, self._offsets(hw, device, rescale), hw)

    def keep(self, hw, device=None):
        """The table of :meth:`visible`, (num_heads, 2H-1, 2W-1), bool, or None."""
        if type(self).visible is SpatialPrior.visible:
            return None
        return self._table(self.visible, self._offsets(hw, device), hw)

    def _offsets(self, hw, device, rescale=None):
        """What the relation sees of a grid's offsets, ((2H-1) * (2W-1), 2)."""
        anchor, dtype = self._anchor(), torch.float32
        if anchor is not None:
            device = anchor.device
            if anchor.dtype == torch.float64:
                dtype = torch.float64
        offsets = relative_offsets(hw, device or 'cpu').to(dtype)
        train_grid = self.train_grid if self.coords in COORDS_OF_A_GRID else None
        if rescale is not None:
            # Before `coords`: an image of another size has such offsets in patches.
            offsets = offsets * rescale.to(offsets)
        return place_offsets(offsets, hw, train_grid, self.coords).flatten(0, 1)

    def _table(self, function, offsets, hw):
        with no_autocast(offsets.device):
            values = function(offsets)
        if values is None:
            return None
        return values.reshape(self.num_heads, 2 * hw[0] - 1, 2 * hw[1] - 1)

    def expand(self, hw):
        """The prior of every pair of patches, Omega of the paper.

        Returns:
            Tensor: (num_heads, N, N) with N = H * W in row-major order; entry
            [h, i, j] belongs to query i and key j.
        """
        return expand_prior(self(hw), hw)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + 'omega' in state_dict:
            raise CheckpointError(
                f'The checkpoint is in deploy form: it holds the values of the prior '
                f'{prefix.rstrip(".")!r} on one grid and no parameters. Build the '
                'model with deploy=True (`model.backbone.deploy=True` in a config), '
                'or load the checkpoint that it was made from.'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, coords={self.coords!r}'
