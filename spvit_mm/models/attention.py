"""SP-SA: self-attention whose scores are multiplied by a spatial prior."""

import torch
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.registry import MODELS

from ..ops import spatial_prior_attention
from .builder import build_child
from .checks import check_heads


class GridAttention(MultiheadAttention):
    """What the attentions that know the grid of patches have in common.

    A subclass writes ``forward(x, hw_shape, omega=None)`` between
    :meth:`project_qkv` and :meth:`merge_heads`. SPViT builds it from its
    ``attn_cfg`` with the arguments below and ``attn_drop``, ``proj_drop``,
    ``dropout_layer``, ``qkv_bias`` and ``layer_scale_init_value``.

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads; must divide ``embed_dims``.
        num_extra_tokens (int): Class and other tokens in front of the patch
            tokens. Defaults to 0.
        grid (Tuple[int, int], optional): The grid (H, W) at training.
            Defaults to None.
        qk_scale (float, optional): Factor of the scores in place of
            ``head_dims ** -0.5``. Defaults to None.
        **kwargs: Other arguments of mmpretrain's MultiheadAttention.

    Raises:
        ValueError: If ``embed_dims`` is not divisible by ``num_heads``.
    """

    def __init__(
        self,
        embed_dims,
        num_heads,
        num_extra_tokens=0,
        grid=None,
        qk_scale=None,
        **kwargs,
    ):
        check_heads(embed_dims, num_heads)
        super().__init__(embed_dims, num_heads, **kwargs)
        self.scale = self.head_dims**-0.5 if qk_scale is None else qk_scale
        self.num_extra_tokens = num_extra_tokens
        self.grid = None if grid is None else tuple(grid)

    def project_qkv(self, x, hw_shape):
        """Queries, keys and values, each (B, heads, T, d), of tokens (B, T, C).

        Raises:
            ValueError: If T does not fit the grid.
        """
        batch, length, _ = x.shape
        height, width = hw_shape
        if length != self.num_extra_tokens + height * width:
            raise ValueError(
                f'`x` has {length} tokens, but `hw_shape` {height} x {width} and '
                f'num_extra_tokens={self.num_extra_tokens} make '
                f'{self.num_extra_tokens + height * width}.'
            )
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dims)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge_heads(self, out, v):
        """Project the heads' outputs (B, heads, T, d) to tokens (B, T, C)."""
        out = out.transpose(1, 2).flatten(2)
        out = self.out_drop(self.gamma1(self.proj_drop(self.proj(out))))
        if self.v_shortcut:
            out = v.squeeze(1) + out
        return out

    def _refuse(self, omega):
        if omega is not None:
            raise ValueError(
                f'`omega`, the table of a spatial prior, belongs to a '
                f'SpatialPriorAttention; {type(self).__name__} takes none.'
            )


@MODELS.register_module()
class SpatialPriorAttention(GridAttention):
    """Spatial Prior-enhanced Self-Attention (SP-SA).

    For head h, with the prior Omega_h of the grid (paper, section 3):

        A_h = softmax(Omega_h * (Q_h K_h^T / sqrt(d)))
        out = concat_h(A_h V_h) W_o

    The product with Omega_h is element-wise and comes before the softmax. A
    new SP-SA computes exactly vanilla self-attention (Omega = 1).

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads; must divide ``embed_dims``.
        prior (dict, optional): Config of the spatial prior. None for one that
            is handed to :meth:`forward`. Defaults to
            ``dict(type='MLPSpatialPrior')``.
        num_extra_tokens (int): Class and other tokens in front of the patch
            tokens; pairs that involve them take prior 1. Defaults to 0.
        grid (Tuple[int, int], optional): The grid (H, W) at training, for
            priors that want to know it. Defaults to None.
        qk_scale (float, optional): Factor of the scores in place of
            ``head_dims ** -0.5``. Defaults to None.
        attn_impl (str): The kernel, see
            :func:`spvit_mm.ops.spatial_prior_attention`. Defaults to 'auto'.
        init_score (float): A score that all pairs start with, from the biases
            of queries and keys. While the prior is 1, the softmax does not see
            it; but it is what the prior multiplies, so a prior learns where to
            look before content does. It needs ``qkv_bias``. Defaults to 0.
        **kwargs: ``attn_drop``, ``proj_drop``, ``dropout_layer``,
            ``qkv_bias``, ``proj_bias``, ``v_shortcut``, ``input_dims``,
            ``layer_scale_init_value``, ``init_cfg`` of mmpretrain's
            MultiheadAttention.

    Raises:
        ValueError: If ``embed_dims`` is not divisible by ``num_heads``, or the
            prior has neither one map nor one per head.
    """

    def __init__(
        self,
        embed_dims,
        num_heads,
        prior=dict(type='MLPSpatialPrior'),
        num_extra_tokens=0,
        grid=None,
        qk_scale=None,
        attn_impl='auto',
        init_score=0.0,
        **kwargs,
    ):
        super().__init__(
            embed_dims, num_heads, num_extra_tokens, grid, qk_scale, **kwargs
        )
        self.attn_impl = attn_impl
        self.init_score = init_score
        if init_score < 0 or (init_score and self.qkv.bias is None):
            raise ValueError(
                '`init_score` must be at least 0, and above 0 needs `qkv_bias=True`, '
                f'got init_score={init_score} and qkv_bias={self.qkv.bias is not None}.'
            )
        self.prior = None
        if prior is not None:
            self.prior = build_child(prior, 'prior', num_heads=num_heads, grid=grid)
            if self.prior.num_heads not in (1, num_heads):
                raise ValueError(
                    f'`prior` has num_heads={self.prior.num_heads}, but an attention '
                    f'of {num_heads} heads takes a prior of 1 or {num_heads}.'
                )

        self.reset_score()

    @torch.no_grad()
    def reset_score(self):
        """Start the biases of queries and keys so that they make ``init_score``."""
        if self.init_score:
            each = (self.init_score / (self.scale * self.head_dims)) ** 0.5
            self.qkv.bias[: 2 * self.embed_dims].fill_(each)

    def init_weights(self):
        super().init_weights()
        self.reset_score()

    def forward(self, x, hw_shape, omega=None):
        """Attend.

        Args:
            x (Tensor): Tokens (B, T, C), T = num_extra_tokens + H * W, the
                extra tokens in front and the patches in row-major order.
            hw_shape (Tuple[int, int]): The grid (H, W).
            omega (Tensor, optional): The prior's table (heads or 1, 2H-1,
                2W-1), instead of the one of this layer's own prior.

        Returns:
            Tensor: (B, T, C).

        Raises:
            ValueError: If T does not fit the grid.
        """
        q, k, v = self.project_qkv(x, hw_shape)
        if omega is None and self.prior is not None:
            omega = self.prior(hw_shape, x.device)
        out = spatial_prior_attention(
            q,
            k,
            v,
            omega,
            hw_shape,
            scale=self.scale,
            num_extra_tokens=self.num_extra_tokens,
            dropout_p=self.attn_drop if self.training else 0.0,
            attn_impl=self.attn_impl,
        )
        return self.merge_heads(out, v)
