"""The spatial relation functions that the paper sets against the MLP.

Each is a :class:`~spvit_mm.models.SpatialPrior`: linear, a table, and windows.
"""

import torch
import torch.nn as nn
from mmpretrain.registry import MODELS

from ...ops.compat import compute_dtype, is_free
from ..checks import check_choice, check_flags
from .base import PATCH_COORDS, SpatialPrior, place_offsets, relative_offsets


@MODELS.register_module()
class LinearSpatialPrior(SpatialPrior):
    """A plane over the offsets: what is left of SP-SA without its nonlinearity.

        f_h(r) = a_h . r + b_h

    A new one is 1 everywhere (a = 0, b = 1).

    Args:
        num_heads (int): Number of heads.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of
            :class:`SpatialPrior`.
    """

    def __init__(self, num_heads, **kwargs):
        super().__init__(num_heads, **kwargs)
        self.slope = nn.Parameter(torch.zeros(num_heads, 2))
        self.bias = nn.Parameter(torch.ones(num_heads))

    def relation(self, offsets):
        slope, bias = self.slope.to(offsets.dtype), self.bias.to(offsets.dtype)
        return torch.addmm(bias[:, None], slope, offsets.t())


@MODELS.register_module()
class TableSpatialPrior(SpatialPrior):
    """One learned scalar per offset and head ("one-hot, then linear").

    The multiplicative relative position embedding. It knows nothing of an
    offset's size: neighbouring offsets share no parameter. A new one is 1
    everywhere.

    On another grid than its own the table is read between its entries,
    bilinearly, at the coordinates that ``coords`` says; further out than it
    reaches, its border goes on. A checkpoint of another grid is resized by the
    same rule when it is loaded.

    Weight decay pulls a table towards 0, not towards 1: switch it off with
    ``paramwise_cfg=dict(custom_keys={'prior.table': dict(decay_mult=0.)})``.

    Args:
        num_heads (int): Number of heads.
        grid (Tuple[int, int]): The grid (H, W) at training. SPViT passes its
            own.
        coords (str): 'scaled' or, the same as each other here, 'raw' and
            'clamped', see :class:`SpatialPrior`. Defaults to 'scaled'.
        **kwargs: ``init_cfg`` of :class:`SpatialPrior`.

    Raises:
        ValueError: If there is no ``grid``, or ``coords`` is none of these.
    """

    COORDS = PATCH_COORDS

    def __init__(self, num_heads, grid=None, coords='scaled', **kwargs):
        check_grid(grid, type(self).__name__)
        super().__init__(num_heads, grid=grid, coords=coords, **kwargs)
        shape = (num_heads, *table_size(self.grid))
        self.table = nn.Parameter(torch.ones(shape))

    def relation(self, offsets):
        return read_table(self.table.to(offsets.dtype), offsets)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # The table fixes the grid of training, so a checkpoint cannot set it.
        if self.coords != 'raw':
            state_dict[prefix + 'train_grid'] = self.train_grid.detach().clone()
        fit_table(state_dict, prefix + 'table', self.table, self.coords)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module()
class WindowSpatialPrior(SpatialPrior):
    """A window around the query: Swin's and CSWin's windows as spatial priors.

    The hard form is fixed, 1 inside and 0 outside:

        f_h(r) = [ |r - shift_h| < size_h / 2  along both axes ]

    so that a window of ``size`` patches holds exactly that many offsets (an
    even size with a shift of half a patch). The soft form is learned, and tends
    to the hard one as its sharpness s grows:

        f_h(r) = prod over axes of sigmoid(s_h * (size_h / 2 - |r - shift_h|))

    A cross is the union of the window and the same window with its sides
    exchanged, p + q - p * q.

    It multiplies the scores, so outside a window all keys take the score 0 and
    not minus infinity; they are attended to alike, whatever they hold. No
    window is neutral: with this prior a new SP-SA is not vanilla attention.

    With ``masked=True`` a hard window is a mask instead: keys outside take minus
    infinity, and inside nothing changes. That is neighbourhood attention
    (https://arxiv.org/abs/2204.07143), whose pairs outside are not computed on the CPU
    and, in whole blocks, on CUDA.

    Args:
        num_heads (int): Number of heads.
        window (int | Sequence): The size in patches: one side for a square, or
            (width, height), or one (width, height) for each head.
            Defaults to 7.
        shift (Sequence): The window's centre (x, y) from the query, right and
            down positive, in patches, or one for each head.
            Defaults to (0, 0).
        shape (str): 'square' (a rectangle where width and height differ) or
            'cross'. Defaults to 'square'.
        soft (bool): Whether to take the soft form and learn size, shift and
            sharpness. Defaults to False.
        sharpness (float): Of the soft form at the start, per patch.
            Defaults to 2.
        masked (bool): Whether a hard window masks what lies outside, see above.
            Defaults to False.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of
            :class:`SpatialPrior`.

    Raises:
        ValueError: If a size, the sharpness or the shape is not one of these.
    """

    COORDS = PATCH_COORDS
    SHAPES = ('square', 'cross')

    def __init__(
        self,
        num_heads,
        window=7,
        shift=(0, 0),
        shape='square',
        soft=False,
        sharpness=2.0,
        masked=False,
        **kwargs,
    ):
        super().__init__(num_heads, **kwargs)
        check_choice('shape', shape, self.SHAPES)
        check_flags(soft=soft, masked=masked)
        if isinstance(window, (int, float)):
            window = (window, window)
        size = self._per_head(window, 'window')
        if not (size > 0).all():
            raise ValueError(f'`window` must be positive, got {window!r}.')
        if not sharpness > 0:
            raise ValueError(f'`sharpness` must be positive, got {sharpness!r}.')
        if masked and (soft or not self._holds_zero(size, shift)):
            raise ValueError(
                '`masked` takes a hard window that holds the query itself, or a query '
                f'could be left without keys; got soft={soft}, window={window!r} and '
                f'shift={shift!r}.'
            )
        self.shape = shape
        self.soft = soft
        self.masked = masked
        half, shift = size / 2, self._per_head(shift, 'shift')
        if soft:
            # Flat: weight decay on matrices only must not shrink a window.
            self.half_size = nn.Parameter(half.flatten())
            self.shift = nn.Parameter(shift.flatten())
            self.log_sharpness = nn.Parameter(
                torch.full((num_heads,), float(sharpness)).log()
            )
        else:
            # The config alone says them, so no checkpoint has to.
            self.register_buffer('half_size', half.flatten(), persistent=False)
            self.register_buffer('shift', shift.flatten(), persistent=False)

    def _per_head(self, value, name):
        """A (heads, 2) tensor of one pair (x, y), or of one for each head."""
        try:
            tensor = torch.as_tensor(value, dtype=torch.float32)
            return tensor.expand(self.num_heads, 2).clone()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f'`{name}` must be a pair (x, y) or {self.num_heads} of them, one '
                f'for each head, got {value!r}.'
            ) from None

    def _holds_zero(self, size, shift):
        return bool((self._per_head(shift, 'shift').abs() < size / 2).all())

    def relation(self, offsets):
        window = self._window(offsets)
        return torch.ones_like(window) if self.masked else window

    def visible(self, offsets):
        return self._window(offsets) > 0 if self.masked else None

    def _window(self, offsets):
        half = self.half_size.to(offsets.dtype).view(-1, 1, 2)
        shift = self.shift.to(offsets.dtype).view(-1, 1, 2)
        away = (offsets - shift).abs()  # (heads, M, 2)
        window = self._inside(half, away)
        if self.shape == 'square':
            return window
        other = self._inside(half.flip(-1), away)
        return window + other - window * other

    def _inside(self, half, away):
        if not self.soft:
            return (away < half).all(dim=-1).to(away.dtype)
        sharpness = self.log_sharpness.to(away.dtype).exp().view(-1, 1, 1)
        return torch.sigmoid(sharpness * (half - away)).prod(dim=-1)

    def extra_repr(self):
        return (
            f'{super().extra_repr()}, shape={self.shape!r}, soft={self.soft}, '
            f'masked={self.masked}'
        )


def check_grid(grid, what):
    """Raise a ValueError unless ``grid`` is one of at least 1 x 1 patches."""
    if grid is None or len(grid) != 2 or min(grid) < 1:
        raise ValueError(
            f'{what} needs `grid`, the (H, W) in patches for which it holds its '
            f'table, got {grid!r}.'
        )


def table_size(grid):
    """Rows and columns (2H-1, 2W-1) of the table of a grid (H, W)."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def read_table(table, offsets):
    """Read a table at any offsets, bilinearly between its entries.

    Args:
        table (Tensor): (.., 2H-1, 2W-1), entry [.., dy + H-1, dx + W-1] at the
            offset (dx, dy).
        offsets (Tensor): (M, 2), offsets (x, y), any real numbers. Further out
            than the table reaches, the nearest entry is taken.

    Returns:
        Tensor: (.., M).
    """
    middle = offsets.new_tensor((table.shape[-1] // 2, table.shape[-2] // 2))
    place = torch.maximum(torch.minimum(offsets + middle, 2 * middle), 0 * middle)
    low = place.floor()
    high = torch.minimum(low + 1, 2 * middle)
    part = (place - low).to(table.dtype)
    (x0, y0), (x1, y1) = low.long().unbind(-1), high.long().unbind(-1)
    above = torch.lerp(table[..., y0, x0], table[..., y0, x1], part[:, 0])
    below = torch.lerp(table[..., y1, x0], table[..., y1, x1], part[:, 0])
    return torch.lerp(above, below, part[:, 1])


def resize_table(table, hw, coords='scaled', rescale=None):
    """The table of another grid, or of rescaled offsets.

    Args:
        table (Tensor): (.., 2H-1, 2W-1), of a grid (H, W).
        hw (Tuple[int, int]): The other grid (H', W').
        coords (str): Where its offsets lie in the table, see
            :class:`~spvit_mm.models.SpatialPrior`. Defaults to 'scaled'.
        rescale (Tensor, optional): (2,), factors of the offsets. Defaults to None.

    Returns:
        Tensor: (.., 2H'-1, 2W'-1); ``table`` itself where the grid is its own and
        nothing is rescaled.
    """
    own = not is_free(hw) and tuple(table.shape[-2:]) == table_size(hw)
    if own and rescale is None:
        return table
    dtype = compute_dtype(table.dtype)
    offsets = relative_offsets(hw, table.device).to(dtype)
    grid = torch.tensor([(side + 1) // 2 for side in table.shape[-2:]])
    if rescale is not None:
        offsets = offsets * rescale.to(offsets)
    offsets = place_offsets(offsets, hw, grid, coords)
    resized = read_table(table.to(dtype), offsets.flatten(0, 1))
    return resized.unflatten(-1, table_size(hw)).to(table.dtype)


def fit_table(state_dict, key, table, coords):
    """Resize the table that a checkpoint holds to the size of our own.

    Entries that differ in more than their grid are left for
    ``load_state_dict`` to report.
    """
    value = state_dict.get(key)
    if value is None or value.shape == table.shape:
        return
    odd = value.dim() == table.dim() and all(side % 2 for side in value.shape[-2:])
    if odd and value.shape[:-2] == table.shape[:-2]:
        hw = tuple((side + 1) // 2 for side in table.shape[-2:])
        state_dict[key] = resize_table(value, hw, coords)
