"""Spatial relation functions: relative patch coordinates -> 2D spatial priors.

Paper: "SP-ViT: Learning 2D Spatial Priors for Vision Transformers", BMVC 2022,
https://arxiv.org/abs/2206.07662

A prior is a function of the offset between two patches alone. On a grid of
H x W patches there are (2H-1)(2W-1) distinct offsets, so a prior is a table of
that size per head; the N x N prior of the paper is that table read N times.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS

from ..ops import expand_prior
from ..ops.compat import is_compiling


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
    if is_compiling():
        # A compiled graph folds them itself, and must hold no tensor of ours.
        return _make_offsets((height, width), device)
    return _cached_offsets((int(height), int(width)), torch.device(device))


def place_offsets(offsets, hw, train_grid, coords):
    """What a spatial relation sees of the offsets of a grid.

    Args:
        offsets (Tensor): (.., 2), relative coordinates (x, y) in patches.
        hw (Tuple[int, int]): The grid (H, W) that they belong to.
        train_grid (Tensor): The grid (H, W) of the training.
        coords (str): 'raw', 'scaled' or 'clamped', see :class:`SpatialPrior`.

    Returns:
        Tensor: (.., 2).
    """
    if coords == 'raw':
        return offsets
    # x belongs to the width, so the grid is read in reverse order.
    train_grid = train_grid.flip(0).to(offsets)
    if coords == 'scaled':
        return offsets * (train_grid / offsets.new_tensor((hw[1], hw[0])))
    far = train_grid - 1
    return torch.maximum(torch.minimum(offsets, far), -far)


class SpatialPrior(BaseModule):
    """Base class of the spatial relation functions.

    A subclass writes :meth:`relation`, the function of the offset, and is a
    complete prior for every grid. Its values are computed in float32 (float64
    in a float64 model), also under mixed precision.

    Args:
        num_heads (int): Number of priors: one per attention head, or 1 for
            one that all heads share.
        grid (Tuple[int, int], optional): The grid of patches at training, in
            (H, W). SPViT passes its own. Defaults to None.
        coords (str): What a relation sees on a grid other than the one of its
            training:

            - ``'raw'``: offsets in patches, as in the released models.
            - ``'scaled'``: offsets times training grid / grid, so that an
              image's border stays where it was.
            - ``'clamped'``: offsets in patches, none further than those of
              the training grid.

            On the training grid the three are the same. For the last two the
            training grid is a buffer, and so is remembered in a checkpoint.
            Defaults to 'raw'.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    COORDS = ('raw', 'scaled', 'clamped')

    def __init__(self, num_heads, grid=None, coords='raw', init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        if not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(
                f'`num_heads` must be a positive integer, got {num_heads!r}.'
            )
        if coords not in self.COORDS:
            raise ValueError(f'`coords` must be one of {self.COORDS}, got {coords!r}.')
        if coords != 'raw' and grid is None:
            raise ValueError(
                f'`coords={coords!r}` needs `grid`, the (H, W) of the training grid.'
            )
        self.num_heads = num_heads
        self.grid = None if grid is None else tuple(grid)
        self.coords = coords
        if coords != 'raw':
            self.register_buffer('train_grid', torch.tensor(self.grid))

    def relation(self, offsets):
        """The spatial relation function f.

        Args:
            offsets (Tensor): (M, 2), relative coordinates (x, y) in patches.

        Returns:
            Tensor: (num_heads, M), the prior of each head at each offset.
        """
        raise NotImplementedError

    def _anchor(self):
        """A tensor that tells device and dtype; None if there is nothing."""
        for tensor in self.parameters():
            return tensor
        for tensor in self.buffers():
            return tensor
        return None

    def _place(self, offsets, hw):
        """Apply the rule of ``coords`` to raw offsets (.., 2) of a grid."""
        train_grid = None if self.coords == 'raw' else self.train_grid
        return place_offsets(offsets, hw, train_grid, self.coords)

    def forward(self, hw, device=None):
        """Evaluate the prior on the distinct offsets of a grid.

        Args:
            hw (Tuple[int, int]): The grid (H, W), each at least 1.
            device (torch.device, optional): Where to compute, for a prior
                without parameters. Defaults to the parameters' device.

        Returns:
            Tensor: The table (num_heads, 2H-1, 2W-1); entry
            [h, dy + H-1, dx + W-1] is f_h((dx, dy)).
        """
        anchor, dtype = self._anchor(), torch.float32
        if anchor is not None:
            device = anchor.device
            if anchor.dtype == torch.float64:
                dtype = torch.float64
        offsets = relative_offsets(hw, device or 'cpu').to(dtype)
        device_type = offsets.device.type
        # autocast knows no meta device, on which large models are built.
        device_type = 'cpu' if device_type == 'meta' else device_type
        with torch.autocast(device_type, enabled=False):
            values = self.relation(self._place(offsets, hw).flatten(0, 1))
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
            raise ValueError(
                f'The checkpoint is in deploy form: it holds the values of the prior '
                f'{prefix.rstrip(".")!r} on one grid and no parameters. Build the '
                'model with deploy=True (`model.backbone.deploy=True` in a config), '
                'or load the checkpoint that it was made from.'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, coords={self.coords!r}'


class ConstantSpatialPrior(SpatialPrior):
    """The deploy form of any prior: its values on one grid, and no parameters.

    Made by :meth:`from_prior`; :meth:`SPViT.switch_to_deploy` puts it in the place
    of every prior. A checkpoint brings its own grid with it.

    Args:
        num_heads (int): Number of priors.
        grid (Tuple[int, int]): The grid (H, W), the only one that it serves.
    """

    def __init__(self, num_heads, grid):
        super().__init__(num_heads, grid=grid)
        height, width = self.grid
        shape = (num_heads, 2 * height - 1, 2 * width - 1)
        self.register_buffer('omega', torch.ones(shape))

    @classmethod
    @torch.no_grad()
    def from_prior(cls, prior, grid, device=None):
        """Evaluate a :class:`SpatialPrior` on a grid (H, W).

        Args:
            prior (SpatialPrior): The prior; it stays as it is.
            grid (Tuple[int, int]): The grid (H, W).
            device (torch.device, optional): Where to put the values of a prior
                without parameters.
        """
        # A buffer born in inference mode could not enter a later training.
        with torch.inference_mode(False):
            new = cls(prior.num_heads, grid)
            new.omega = prior(new.grid, device).detach().clone()
        return new.train(prior.training)

    def forward(self, hw, device=None):
        """The table (num_heads, 2H-1, 2W-1) of the one grid.

        Raises:
            ValueError: For another grid.
        """
        hw = (int(hw[0]), int(hw[1]))
        if hw != self.grid:
            raise ValueError(
                f'The image makes a grid of {hw[0]} x {hw[1]} patches, but this model '
                f'was deployed for {self.grid[0]} x {self.grid[1]}, for which the '
                "priors' values are fixed. Resize the image to that grid, or deploy "
                f'the trained model again for this one: '
                f'`switch_to_deploy(grid=({hw[0]}, {hw[1]}))`, or '
                f'tools/model_converters/reparameterize_model.py with '
                f'`--grid {hw[0]} {hw[1]}`.'
            )
        omega = self.omega
        return omega if omega.dtype == torch.float64 else omega.float()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        value = state_dict.get(prefix + 'omega')
        if value is None:
            if any(key.startswith(prefix) for key in state_dict):
                raise ValueError(
                    f'The checkpoint holds the parameters of the prior '
                    f'{prefix.rstrip(".")!r}, but this model is in deploy form, which '
                    'holds its values on one grid. Convert the checkpoint with '
                    'tools/model_converters/reparameterize_model.py, or build the '
                    'model with deploy=False.'
                )
        elif value.dim() == 3 and value.shape[0] == self.num_heads:
            self.grid = ((value.shape[1] + 1) // 2, (value.shape[2] + 1) // 2)
            with torch.no_grad():
                self.omega.resize_(value.shape)
        # The base class takes a table for a mistake.
        BaseModule._load_from_state_dict(self, state_dict, prefix, *args)

    def extra_repr(self):
        return f'num_heads={self.num_heads}, grid={self.grid}'


@MODELS.register_module()
class MLPSpatialPrior(SpatialPrior):
    """The spatial prior of SP-SA: a small MLP of the relative coordinates.

    For head h and offset r, with one hidden layer:

        f_h(r) = w2_h . ReLU(W1_h r + b1_h) + b2_h

    A new prior is 1 everywhere (w2 = 0, b2 = 1), so that SP-SA starts as
    vanilla self-attention. The parameters are plain ones, not nn.Linear, since
    model configs such as DeiT's re-initialise every nn.Linear.

    Parameters are stored flat with the heads one after another: ``w1``
    (heads * hidden, 2), ``b1`` (heads * hidden), ``w2`` (heads * hidden, 1),
    ``b2`` (heads): the released layout, in which weight decay on matrices only
    takes W1 and w2 and leaves the biases. A deeper MLP goes on in the same
    way: ``w2`` (heads * hidden_2, hidden_1), ..., and the last is the output.

    Args:
        num_heads (int): Number of heads.
        hidden_dims (int | Sequence[int]): Width of the hidden layer, or of
            each of several. Defaults to 32.
        act_cfg (dict): Config of the activation.
            Defaults to ``dict(type='ReLU', inplace=True)``.
        init (str): How the hidden layers start.

            - ``'released'``: weights truncated normal with std 0.02, biases 0:
              every hinge of the ReLU passes through the query itself.
            - ``'spread'``: weights uniform of the usual fan-in size, the first
              biases uniform over the size of ``grid``: hinges all over it.
            - ``'local'``: each head looks at its own point c_h beside the query,
              f_h(r) = 1 - locality * |r - c_h|, the norm made of hinges in
              all directions. Not neutral: for a model trained from scratch, in
              which ``SpatialPriorAttention(init_score=...)`` gives it a score to
              multiply.

            Defaults to 'released'.
        locality (float): The slope of a ``'local'`` start. Defaults to 1.0.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of
            :class:`SpatialPrior`.
    """

    INITS = ('released', 'spread', 'local')

    def __init__(
        self,
        num_heads,
        hidden_dims=32,
        act_cfg=dict(type='ReLU', inplace=True),
        init='released',
        locality=1.0,
        **kwargs,
    ):
        super().__init__(num_heads, **kwargs)
        widths = (hidden_dims,) if isinstance(hidden_dims, int) else tuple(hidden_dims)
        if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(
                '`hidden_dims` must be a positive integer or a sequence of them, '
                f'got {hidden_dims!r}.'
            )
        if init not in self.INITS:
            raise ValueError(f'`init` must be one of {self.INITS}, got {init!r}.')
        if init == 'spread' and self.grid is None:
            raise ValueError(
                "`init='spread'` needs `grid`, the (H, W) over which to spread."
            )
        if init == 'local' and (len(widths) > 1 or widths[0] < 4):
            raise ValueError(
                "`init='local'` needs one hidden layer of at least 4 units, got "
                f'hidden_dims={hidden_dims!r}.'
            )
        self.hidden_dims = widths
        self.init = init
        self.locality = locality
        self.act = MODELS.build(act_cfg)
        fan_in = 2
        for i, width in enumerate(widths, 1):
            setattr(self, f'w{i}', nn.Parameter(torch.empty(num_heads * width, fan_in)))
            setattr(self, f'b{i}', nn.Parameter(torch.empty(num_heads * width)))
            fan_in = width
        last = len(widths) + 1
        setattr(self, f'w{last}', nn.Parameter(torch.empty(num_heads * fan_in, 1)))
        setattr(self, f'b{last}', nn.Parameter(torch.empty(num_heads)))
        self.reset_parameters()

    def _layer(self, i):
        return getattr(self, f'w{i}'), getattr(self, f'b{i}')

    @torch.no_grad()
    def reset_parameters(self):
        """Start as `init` says; 1 everywhere unless it is 'local'."""
        for i in range(1, len(self.hidden_dims) + 1):
            weight, bias = self._layer(i)
            if self.init == 'spread':
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
                reach = max(self.grid) if i == 1 else bound
                nn.init.uniform_(bias, -reach, reach)
            else:
                nn.init.trunc_normal_(weight, std=0.02)
                nn.init.zeros_(bias)
        weight, bias = self._layer(len(self.hidden_dims) + 1)
        nn.init.zeros_(weight)
        nn.init.ones_(bias)
        if self.init == 'local':
            self._reset_to_local()

    def _reset_to_local(self):
        """Set f_h(r) = 1 - locality * |r - c_h|, the c_h on a ring around the query.

        |v| is the mean over directions u of (pi / 2) |u . v|, and |u . v| is the
        sum of two hinges.
        """
        pairs = self.hidden_dims[0] // 2
        angle = torch.arange(pairs) * (math.pi / pairs)
        u = torch.stack((angle.cos(), angle.sin()), dim=1)
        u = torch.cat((u, -u)).to(self.w1)
        turn = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        centres = torch.stack((turn.cos(), turn.sin()), dim=1).to(u)
        if self.num_heads == 1:
            centres.zero_()
        # An odd unit that is left keeps its start and its weight of 0.
        w1, b1, w2 = (
            p.unflatten(0, (self.num_heads, -1))[:, : 2 * pairs]
            for p in (self.w1, self.b1, self.w2)
        )
        w1.copy_(u.expand_as(w1))
        b1.copy_(-(centres @ u.t()))
        w2.fill_(-self.locality * math.pi / (2 * pairs))

    def relation(self, offsets):
        heads, dtype = self.num_heads, offsets.dtype
        # All heads see the same offsets: the first layer is one product, whose bias
        # is a third coordinate, since adding it would be a pass over the result.
        weight = torch.cat((self.w1, self.b1[:, None]), dim=1).to(dtype)
        x = self.act(weight @ F.pad(offsets, (0, 1), value=1.0).t())
        x = x.unflatten(0, (heads, -1))
        for i in range(2, len(self.hidden_dims) + 1):
            weight, bias = (
                p.to(dtype).unflatten(0, (heads, -1)) for p in self._layer(i)
            )
            x = self.act(torch.baddbmm(bias[..., None], weight, x))
        weight, bias = self._layer(len(self.hidden_dims) + 1)
        weight = weight.to(dtype).view(heads, 1, -1)
        return torch.baddbmm(bias.to(dtype)[:, None, None], weight, x).squeeze(1)

    def extra_repr(self):
        return f'{super().extra_repr()}, hidden_dims={self.hidden_dims}, init={self.init!r}'
