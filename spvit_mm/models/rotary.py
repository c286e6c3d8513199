"""Rotary position embedding in two dimensions."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.registry import MODELS

from ..ops.compat import compute_dtype, no_autocast
from .attention import GridAttention
from .checks import check_choice


@MODELS.register_module()
class RotaryPositionAttention(GridAttention):
    """Self-attention with rotary positions: RoPE-ViT's two, and DINOv3's.

    The d channels of a head are d / 2 pairs. Queries and keys are rotated, pair t by an
    angle that is linear in the patch's place, so that their product knows the offset:

        axial       theta ** (-4t / d) * x   for the first d / 4 pairs,
                    the same of y            for the others
        mixed       fx_t * x + fy_t * y      fx, fy learned for each head and layer
        normalized  2 pi * u / 100 ** (4t / d)   for the first d / 4 pairs,
                    the same of v                for the others

    with x, y the patch's column and row, counted from 0, and u, v its centre in the
    image, scaled to [-1, 1]. t counts the pairs of one axis, 0 .. d / 4 - 1. Pair t is
    made of the channels t and t + d / 2; which ones are paired is a matter of the
    projection's rows alone. Extra tokens are not rotated.

    Axial and mixed: Heo et al., https://arxiv.org/abs/2403.13298; a mixed one starts with
    the magnitudes theta ** (-4t / d) in one random direction for each head, and in the
    direction across for the other d / 4 pairs. Normalized:
    Siméoni et al., https://arxiv.org/abs/2508.10104, trained with ``coords_rescale=2`` of
    :class:`SPViT`. The angles are computed in float32, also under mixed precision.

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads, of a width that 4 divides.
        mode (str): 'axial', 'mixed' or 'normalized'. Defaults to 'mixed'.
        theta (float, optional): The base. Defaults to None: 10 for 'mixed', else 100.
        **kwargs: Other arguments of
            :class:`~spvit_mm.models.attention.GridAttention`.

    Raises:
        ValueError: If 4 does not divide a head's width, or ``mode`` is none of these.
    """

    MODES = ('axial', 'mixed', 'normalized')

    def __init__(self, embed_dims, num_heads, mode='mixed', theta=None, **kwargs):
        super().__init__(embed_dims, num_heads, **kwargs)
        check_choice('mode', mode, self.MODES)
        if self.head_dims % 4:
            raise ValueError(
                'Rotary positions take two channels for each axis, so 4 must divide the '
                f"heads' width, got embed_dims={embed_dims} and num_heads={num_heads}, a "
                f'width of {self.head_dims}.'
            )
        self.mode = mode
        self.theta = (10.0 if mode == 'mixed' else 100.0) if theta is None else theta
        if not self.theta > 0:
            raise ValueError(f'`theta` must be above 0, got {theta!r}.')
        if mode == 'mixed':
            # In one axis, so that weight decay on matrices only leaves it alone.
            self.freqs = nn.Parameter(torch.empty(2 * num_heads * self.head_dims // 2))
            self.reset_freqs()

    def _magnitudes(self, device, dtype=torch.float32):
        steps = torch.arange(self.head_dims // 4, dtype=dtype, device=device)
        return self.theta ** (-4 * steps / self.head_dims)

    @torch.no_grad()
    def reset_freqs(self):
        """Start the learned frequencies anew."""
        angle = 2 * math.pi * torch.rand(self.num_heads, 1, device=self.freqs.device)
        size = self._magnitudes(self.freqs.device)
        fx = torch.cat((size * angle.cos(), -size * angle.sin()), dim=1)
        fy = torch.cat((size * angle.sin(), size * angle.cos()), dim=1)
        self.freqs.copy_(torch.stack((fx, fy)).flatten())

    def _places(self, hw, device, dtype, rescale):
        """The coordinates of the columns (W) and of the rows (H)."""
        places = []
        for axis, side in enumerate((hw[1], hw[0])):
            place = torch.arange(side, dtype=dtype, device=device)
            if self.mode == 'normalized':
                place = (2 * place + 1) / side - 1
            if rescale is not None:
                place = place * rescale[axis].to(place)
            places.append(place)
        return places

    def rotations(self, hw, device, dtype=torch.float32, rescale=None):
        """Cosine and sine of the angle of every pair of channels.

        Args:
            hw (Tuple[int, int]): The grid (H, W).
            device (torch.device): Where to compute.
            dtype (torch.dtype): What to compute in. Defaults to float32.
            rescale (Tensor, optional): (2,), factors of x and y. Defaults to None.

        Returns:
            Tuple[Tensor, Tensor]: Each (heads or 1, H * W, d / 2).
        """
        x, y = self._places(hw, device, dtype, rescale)
        if self.mode == 'mixed':
            fx, fy = self.freqs.to(dtype).view(2, self.num_heads, 1, -1)
            a = (fx * x[:, None])[:, None]  # (heads, 1, W, d / 2)
            b = (fy * y[:, None])[:, :, None]  # (heads, H, 1, d / 2)
            # cos(a + b) and sin(a + b) from one cosine and sine for each row and column
            cos = a.cos() * b.cos() - a.sin() * b.sin()
            sin = a.sin() * b.cos() + a.cos() * b.sin()
            return cos.flatten(1, 2), sin.flatten(1, 2)
        freqs = self._magnitudes(device, dtype)
        if self.mode == 'normalized':
            freqs = 2 * math.pi * freqs
        shape = (hw[0], hw[1], len(freqs))
        a = (x[:, None] * freqs).expand(shape)
        b = (y[:, None] * freqs)[:, None].expand(shape)
        angle = torch.cat((a, b), dim=-1).flatten(0, 1)[None]
        return angle.cos(), angle.sin()

    def rotate(self, q, k, hw, rescale=None):
        """Turn queries and keys, each (B, heads, T, d); extra tokens stay as they are.

        Args:
            q (Tensor): Queries.
            k (Tensor): Keys.
            hw (Tuple[int, int]): The grid (H, W).
            rescale (Tensor, optional): (2,), factors of x and y. Defaults to None.

        Returns:
            Tuple[Tensor, Tensor]: Like ``q`` and ``k``.
        """
        with no_autocast(q.device):
            pad = (0, 0, self.num_extra_tokens, 0)
            dtype = compute_dtype(q.dtype)
            cos, sin = self.rotations(hw, q.device, dtype, rescale)
            cos, sin = F.pad(cos, pad, value=1.0), F.pad(sin, pad)
            return turn(q, cos, sin), turn(k, cos, sin)

    def forward(self, x, hw_shape, omega=None, rescale=None):
        """Attend; arguments as in :meth:`GatedPositionalAttention.forward`."""
        self._refuse(omega)
        q, k, v = self.project_qkv(x, hw_shape)
        q, k = self.rotate(q, k, hw_shape, rescale)
        return self.merge_heads(self.fused_attention(q, k, v), v)


def turn(x, cos, sin):
    """Rotate the pairs of channels (t, t + d / 2) of ``x`` (.., T, d).

    ``cos`` and ``sin`` are (.., T, d / 2). Computed in float32 at least.
    """
    first, second = x.to(compute_dtype(x.dtype)).chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
