"""The spatial prior of SP-SA."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.registry import MODELS

from ..checks import check_choice, is_int
from .base import SpatialPrior


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
              ``f_h(r) = 1 - locality * |r - c_h|``, the norm made of hinges in
              all directions (of a ReLU: another activation gives another shape).
              Not neutral: for a model trained from scratch, in which
              ``SpatialPriorAttention(init_score=...)`` gives it a score to multiply.

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
        widths = (hidden_dims,) if is_int(hidden_dims) else tuple(hidden_dims)
        if not widths or any(not is_int(width) or width < 1 for width in widths):
            raise ValueError(
                '`hidden_dims` must be a positive integer or a sequence of them, '
                f'got {hidden_dims!r}.'
            )
        check_choice('init', init, self.INITS)
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
