"""Attentions with relative positions that SP-SA is set against.

ConViT's gated positional self-attention (PSA) mixes a positional attention with
that of the content; Shaw's relative position embedding and Swin's relative
position bias add to its scores. Each can be ``attn_cfg`` of an SPViT.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.registry import MODELS

from ..ops import expand_prior
from ..ops.compat import compute_dtype, is_free, no_autocast
from ..ops.prior import all_offsets
from .attention import GridAttention
from .checks import check_choice
from .priors import relative_offsets
from .priors.base import PATCH_COORDS
from .priors.simple import (
    check_grid,
    fit_table,
    resize_table,
    table_size,
)


@MODELS.register_module()
class GatedPositionalAttention(GridAttention):
    """ConViT's gated positional self-attention (PSA).

    https://arxiv.org/abs/2103.10697. For head h and patches i, j with offset r:

        P_h = softmax_j( v_h . (||r||^2, r_x, r_y) )
        A_h = (1 - s_h) softmax(Q_h K_h^T / sqrt(d)) + s_h P_h,
        s_h = sigmoid(lambda_h)

    Extra tokens have no position: where a pair involves one, A_h is the content
    attention alone. Every row of A_h is then divided by its sum.

    The local start makes a convolution of it: with lambda = 1 and
    v_h = alpha * (-1, 2 dx_h, 2 dy_h), head h looks at the patch (dx_h, dy_h)
    from the query, the heads side by side on a square around it, and the value
    projection is the identity. ``init_weights`` restores that start after the
    model's own ``init_cfg`` has re-initialised every nn.Linear.

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads. The local start takes square
            numbers (1, 4, 9, 16, ..) alone.
        init (str): ``'local'``, or ``'random'``: v_h normal with std 0.02 and
            the value projection as any other. Defaults to 'local'.
        locality_strength (float): alpha. Defaults to 1.
        gate (float): lambda at the start. Defaults to 1.
        **kwargs: Other arguments of
            :class:`~spvit_mm.models.attention.GridAttention`. With ``grid`` or
            without it takes any grid; offsets count in patches.

    Raises:
        ValueError: If the number of heads is not square for the local start.
    """

    INITS = ('local', 'random')

    def __init__(
        self,
        embed_dims,
        num_heads,
        init='local',
        locality_strength=1.0,
        gate=1.0,
        **kwargs,
    ):
        super().__init__(embed_dims, num_heads, **kwargs)
        check_choice('init', init, self.INITS)
        if init == 'local' and math.isqrt(num_heads) ** 2 != num_heads:
            raise ValueError(
                "`init='local'` sets the heads on a square around the query, so "
                f'`num_heads` must be a square number (1, 4, 9, 16, ..), got '
                f"{num_heads}. Take an arch such as 'deit-small-9h', or "
                "init='random'."
            )
        if init == 'local' and self.input_dims != embed_dims:
            raise ValueError(
                "`init='local'` starts with the identity as the value projection, so "
                f'`input_dims` must be embed_dims={embed_dims}, got {self.input_dims}.'
            )
        self.init = init
        self.locality_strength = locality_strength
        self.initial_gate = gate
        self.position = nn.Parameter(torch.empty(num_heads, 3))
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.reset_position()

    def head_centres(self):
        """The offsets (x, y) that the heads start at, (heads, 2)."""
        side = math.isqrt(self.num_heads)
        steps = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        dy, dx = torch.meshgrid(steps, steps, indexing='ij')
        return torch.stack((dx, dy), dim=-1).flatten(0, 1)

    @torch.no_grad()
    def reset_position(self):
        """Start with the positions, the gate and the values that ``init`` says."""
        nn.init.constant_(self.gate, self.initial_gate)
        if self.init == 'random':
            nn.init.trunc_normal_(self.position, std=0.02)
            return
        self.position[:, 0] = -self.locality_strength
        self.position[:, 1:] = 2 * self.locality_strength * self.head_centres()
        nn.init.eye_(self.qkv.weight[2 * self.embed_dims :])
        if self.qkv.bias is not None:
            nn.init.zeros_(self.qkv.bias[2 * self.embed_dims :])

    def init_weights(self):
        super().init_weights()
        self.reset_position()

    def position_scores(self, hw_shape, rescale=None):
        """v_h . (||r||^2, r_x, r_y) at every offset, (heads, 2H-1, 2W-1)."""
        dtype = compute_dtype(self.position.dtype)
        offsets = relative_offsets(hw_shape, self.position.device).to(dtype)
        if rescale is not None:
            offsets = offsets * rescale.to(dtype)
        squares = offsets.square().sum(dim=-1, keepdim=True)
        features = torch.cat((squares, offsets), dim=-1)
        scores = self.position.to(dtype) @ features.flatten(0, 1).t()
        return scores.view(-1, *table_size(hw_shape))

    def forward(self, x, hw_shape, omega=None, rescale=None):
        """Attend.

        Args:
            x (Tensor): Tokens (B, T, C), T = num_extra_tokens + H * W, the
                extra tokens in front and the patches in row-major order.
            hw_shape (Tuple[int, int]): The grid (H, W).
            omega (None): No table of a prior is taken.
            rescale (Tensor, optional): (2,), factors of the offsets.
                Defaults to None.

        Returns:
            Tensor: (B, T, C).
        """
        self._refuse(omega)
        q, k, v = self.project_qkv(x, hw_shape)
        scores = torch.matmul(q * self.scale, k.transpose(-2, -1))
        attn = self.mix(scores, hw_shape, rescale)
        attn = F.dropout(attn.to(v.dtype), self.attn_drop, self.training)
        return self.merge_heads(torch.matmul(attn, v), v)

    def mix(self, scores, hw_shape, rescale=None):
        """A_h (B, heads, T, T) of the scaled content scores (B, heads, T, T)."""
        with no_autocast(scores.device):
            dtype = compute_dtype(scores.dtype)
            content = scores.to(dtype).softmax(dim=-1)
            table = self.position_scores(hw_shape, rescale).to(dtype)
            position = expand_prior(table, hw_shape).softmax(dim=-1)
            gate = torch.sigmoid(self.gate.to(dtype)).view(-1, 1, 1)
            extra = self.num_extra_tokens
            if not extra:
                return torch.lerp(content, position, gate)
            pad = (extra, 0, extra, 0)
            gate = F.pad(gate.expand_as(position), pad)  # 0 where no position is
            attn = torch.lerp(content, F.pad(position, pad), gate)
            return attn / attn.sum(dim=-1, keepdim=True)


@MODELS.register_module()
class RelativePositionAttention(GridAttention):
    """Self-attention with additive relative positions.

    For head h, query i and key j with offset r:

        bias:       softmax_j( q_i . k_j / sqrt(d) + B_h[r] )
        embedding:  softmax_j( (q_i . k_j + q_i . R_h[r]) / sqrt(d) )

    B is Swin's and BEiT's relative position bias (a learned scalar, start 0), R
    the relative position embedding of Shaw et al.
    (https://arxiv.org/abs/1803.02155; a learned vector, start normal with std
    0.02). Pairs that involve an extra token have neither.

    On another grid the table is read bilinearly with the coordinates that
    ``coords`` says, and a checkpoint of another grid is resized likewise.

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads.
        mode (str): 'bias' or 'embedding'. Defaults to 'bias'.
        grid (Tuple[int, int]): The grid (H, W) at training. SPViT passes its
            own.
        coords (str): 'scaled' (offsets times training grid / grid), or 'raw'
            or 'clamped' (offsets in patches, the table's border beyond it).
            Defaults to 'scaled'.
        **kwargs: Other arguments of
            :class:`~spvit_mm.models.attention.GridAttention`.

    Raises:
        ValueError: If there is no ``grid``, or ``mode`` or ``coords`` is none
            of these.
    """

    MODES = ('bias', 'embedding')
    COORDS = PATCH_COORDS

    def __init__(
        self, embed_dims, num_heads, mode='bias', grid=None, coords='scaled', **kwargs
    ):
        super().__init__(embed_dims, num_heads, grid=grid, **kwargs)
        check_grid(grid, type(self).__name__)
        check_choice('mode', mode, self.MODES)
        check_choice('coords', coords, self.COORDS)
        self.mode = mode
        self.coords = coords
        channels = (self.head_dims,) if mode == 'embedding' else ()
        shape = (num_heads, *channels, *table_size(self.grid))
        self.table = nn.Parameter(torch.zeros(shape))
        if mode == 'embedding':
            nn.init.trunc_normal_(self.table, std=0.02)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        fit_table(state_dict, prefix + 'table', self.table, self.coords)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x, hw_shape, omega=None, rescale=None):
        """Attend; arguments as in :meth:`GatedPositionalAttention.forward`."""
        self._refuse(omega)
        q, k, v = self.project_qkv(x, hw_shape)
        bias = self.position_scores(q, hw_shape, rescale).to(q.dtype)
        return self.merge_heads(self.fused_attention(q, k, v, bias), v)

    def position_scores(self, q, hw_shape, rescale=None):
        """What is added to the scaled scores, (B or 1, heads, T, T)."""
        table = resize_table(self.table, hw_shape, self.coords, rescale)
        extra = self.num_extra_tokens
        if self.mode == 'bias':
            scores = expand_prior(table, hw_shape)[None]
        else:
            scores = relative_scores(q[:, :, extra:] * self.scale, table, hw_shape)
        return F.pad(scores, (extra, 0, extra, 0))


def relative_scores(q, table, hw):
    """q_i . R[r_ij] for all pairs of patches, without N^2 vectors in memory.

    Args:
        q (Tensor): (B, heads, N, d), N = H * W.
        table (Tensor): (heads, d, 2H-1, 2W-1).
        hw (Tuple[int, int]): The grid (H, W).

    Returns:
        Tensor: (B, heads, N, N).
    """
    height, width = hw
    if is_free(hw):  # no windows and no loop: q_i . R[r] of all offsets r
        scores = (q @ table.flatten(2)).unflatten(3, table_size(hw))
        dy, dx = all_offsets(hw, q.device)
        query = torch.arange(dy.shape[0], device=q.device)[:, None]
        return scores[:, :, query, dy, dx]
    # (heads, d, 2H-1, x_i, x_j): the table at x_j - x_i
    columns = table.unfold(3, width, 1).flip(3)
    scores = torch.einsum('bhyxd,hdaxu->bhyxau', q.unflatten(2, hw), columns)
    # Of the 2H-1 row offsets, row y_i needs the H that lead to rows 0..H-1.
    rows = [
        scores[:, :, y, :, height - 1 - y :][:, :, :, :height] for y in range(height)
    ]
    return torch.stack(rows, dim=2).flatten(4).flatten(2, 3)
