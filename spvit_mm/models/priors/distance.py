"""Additive relative positions of other papers, as priors for ``combine='add'``.

Their values are 1 plus what the paper adds to the scores, since 1 is what a prior is
where it changes nothing. Each takes any grid; extra tokens have no position.
"""

import math

import torch
import torch.nn as nn
from mmpretrain.registry import MODELS

from ..checks import check_int
from .base import PATCH_COORDS, SpatialPrior


@MODELS.register_module()
class ALiBiSpatialPrior(SpatialPrior):
    """Linear biases of the distance (ALiBi), in two dimensions.

        B_h(r) = -m_h |r|,    m_h = 2 ** (-8 h / heads),  h = 1 .. heads

    Nothing is learned. In one dimension: Press et al., https://arxiv.org/abs/2108.12409;
    with the Euclidean distance of patches: CROMA, https://arxiv.org/abs/2311.00566.

    Args:
        num_heads (int): Number of heads.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of :class:`SpatialPrior`.
    """

    is_bias = True

    def __init__(self, num_heads, **kwargs):
        super().__init__(num_heads, **kwargs)
        steps = torch.arange(1, num_heads + 1, dtype=torch.float32)
        slopes = torch.exp2(-8 * steps / num_heads)
        # The config alone says them, so no checkpoint has to.
        self.register_buffer('slopes', slopes, persistent=False)

    def relation(self, offsets):
        return 1 - self.slopes.to(offsets.dtype)[:, None] * offsets.norm(dim=-1)


@MODELS.register_module()
class KERPLESpatialPrior(SpatialPrior):
    """Logarithmic biases of the distance (KERPLE), in two dimensions.

        B_h(r) = -a_h log(1 + p_h |r|),    a_h, p_h > 0 learned

    Chi et al., https://arxiv.org/abs/2205.09921, with the Euclidean distance of
    patches. Stored are the logarithms of a and p, in one axis, so that weight decay on
    matrices only leaves them alone. All heads start with a = p = 1.

    Args:
        num_heads (int): Number of heads.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of :class:`SpatialPrior`.
    """

    is_bias = True

    def __init__(self, num_heads, **kwargs):
        super().__init__(num_heads, **kwargs)
        self.log_a = nn.Parameter(torch.zeros(num_heads))
        self.log_p = nn.Parameter(torch.zeros(num_heads))

    def relation(self, offsets):
        a = self.log_a.to(offsets.dtype).exp()[:, None]
        p = self.log_p.to(offsets.dtype).exp()[:, None]
        return 1 - a * torch.log1p(p * offsets.norm(dim=-1))


@MODELS.register_module()
class LookHereSpatialPrior(SpatialPrior):
    """LookHere: heads that look into one direction each, and a bias of the distance.

        B_h(r) = -slope_layer * slope_h * |r|   where r is within the field of view
                 minus infinity                 elsewhere

    Fuller et al., https://arxiv.org/abs/2405.13985: fixed, and made for models without a
    position embedding. A third of the heads looks to a side (right, left, down, up), a
    third to a corner, and a third all around. The slope of a head with a direction is
    1/2; those of the others are 1/2, 1/8, 1/32, 1/128 as in the paper's text (its code
    has 1/4, 1/16, 1/64, 1/256, also for more such heads). The slope of the layers falls
    from 1.5 at the first to 0.5 at the last; a prior that the whole network shares has 1.
    The border of a field of view belongs to it, and so does the patch itself.

    Args:
        num_heads (int): Number of heads: a multiple of 12, unless ``views`` is given.
        field_of_view (float): In degrees: 180, 90 or 45 in the paper. Defaults to 90.
        views (Sequence[str], optional): Where each head looks: 'right', 'left', 'down',
            'up', 'right-down', 'left-down', 'right-up', 'left-up' or 'all'. Defaults to
            None: the paper's thirds.
        **kwargs: ``grid``, ``coords`` and ``init_cfg`` of :class:`SpatialPrior`.

    Raises:
        ValueError: For a number of heads that does not split, or other views.
    """

    is_bias = True
    COORDS = PATCH_COORDS
    DIRECTIONS = {
        'right': (1, 0),
        'left': (-1, 0),
        'down': (0, 1),
        'up': (0, -1),
        'right-down': (1, 1),
        'left-down': (-1, 1),
        'right-up': (1, -1),
        'left-up': (-1, -1),
        'all': (0, 0),
    }
    DIRECTED_SLOPE = 1 / 2
    ALL_SLOPES = (1 / 2, 1 / 8, 1 / 32, 1 / 128)

    def __init__(self, num_heads, field_of_view=90, views=None, **kwargs):
        super().__init__(num_heads, **kwargs)
        if not 0 < field_of_view <= 360:
            raise ValueError(
                f'`field_of_view` must lie in (0, 360] degrees, got {field_of_view!r}.'
            )
        views = self._split(num_heads) if views is None else tuple(views)
        if len(views) != num_heads or not set(views) <= set(self.DIRECTIONS):
            raise ValueError(
                f'`views` must name one of {tuple(self.DIRECTIONS)} for each of the '
                f'{num_heads} heads, got {views}.'
            )
        self.field_of_view = field_of_view
        self.views = views
        self.layer_slope = 1.0
        around = iter(self.ALL_SLOPES * num_heads)
        slopes = [next(around) if v == 'all' else self.DIRECTED_SLOPE for v in views]
        directions = torch.tensor([self.DIRECTIONS[view] for view in views]).float()
        directions = nn.functional.normalize(directions, dim=-1)
        self.register_buffer('slopes', torch.tensor(slopes), persistent=False)
        self.register_buffer('directions', directions, persistent=False)

    def _split(self, num_heads):
        if num_heads % 12:
            raise ValueError(
                'LookHere has a third of the heads for four sides, a third for four '
                f'corners and a third for all, so `num_heads` must be a multiple of 12, '
                f'got {num_heads}. Name the direction of each head in `views`.'
            )
        sides, corners = tuple(self.DIRECTIONS)[:4], tuple(self.DIRECTIONS)[4:8]
        each = num_heads // 12
        return (*(sides * each), *(corners * each), *(('all',) * 4 * each))

    def set_depth(self, layer, num_layers):
        self.layer_slope = 1.5 - layer / max(num_layers - 1, 1)

    def relation(self, offsets):
        slopes = self.layer_slope * self.slopes.to(offsets.dtype)
        return 1 - slopes[:, None] * offsets.norm(dim=-1)

    def visible(self, offsets):
        distance = offsets.norm(dim=-1)
        along = self.directions.to(offsets.dtype) @ offsets.t()
        # Less by more than float32's rounding: the border belongs to the view, and on
        # large grids an offset just behind it does not.
        least = (math.cos(math.radians(self.field_of_view / 2)) - 1e-6) * distance
        around = (self.directions == 0).all(dim=-1, keepdim=True)
        return (along >= least) | around

    def extra_repr(self):
        return (
            f'{super().extra_repr()}, field_of_view={self.field_of_view}, '
            f'views={self.views}'
        )


@MODELS.register_module()
class LogCPBSpatialPrior(SpatialPrior):
    """Swin Transformer V2's log-spaced continuous position bias (log-CPB).

        B_h(r) = 16 sigmoid( w2_h . ReLU(W1 c(r) + b1) ) - 8

    with the coordinates c of ``coords='swinv2'``: one hidden layer for all heads, and no
    second bias. Liu et al., https://arxiv.org/abs/2111.09883, eq. 3 and 4; the constant 8
    is not in the paper, changes nothing where all tokens are patches, and makes a new
    prior neutral beside a class token. Weights start truncated normal with std 0.02.

    Args:
        num_heads (int): Number of heads.
        hidden_dims (int): Width of the hidden layer. Defaults to 512.
        coords (str): See :class:`SpatialPrior`. Defaults to 'swinv2'.
        **kwargs: ``grid`` and ``init_cfg`` of :class:`SpatialPrior`.
    """

    def __init__(self, num_heads, hidden_dims=512, coords='swinv2', **kwargs):
        super().__init__(num_heads, coords=coords, **kwargs)
        hidden_dims = check_int('hidden_dims', hidden_dims, 1)
        self.w1 = nn.Parameter(torch.empty(hidden_dims, 2))
        self.b1 = nn.Parameter(torch.zeros(hidden_dims))
        self.w2 = nn.Parameter(torch.empty(num_heads, hidden_dims))
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=0.02)

    def relation(self, offsets):
        w1, b1 = self.w1.to(offsets.dtype), self.b1.to(offsets.dtype)
        hidden = torch.addmm(b1[:, None], w1, offsets.t()).relu()
        return 16 * torch.sigmoid(self.w2.to(offsets.dtype) @ hidden) - 7
