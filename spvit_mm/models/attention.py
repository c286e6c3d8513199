"""SP-SA: self-attention whose scores are multiplied by a spatial prior."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.registry import MODELS

from ..ops import ATTN_IMPLS, check_keep, spatial_prior_attention
from ..ops.compat import is_free
from ..utils import CheckpointError
from .builder import build_child
from .checks import check_choice, check_heads
from .priors import WindowSpatialPrior


def evaluate_priors(prior, bias_prior, hw, device=None, rescale=None):
    """The tables of the priors of one attention, on one grid.

    Args:
        prior (SpatialPrior): Of the product, or of the sum where there is no other.
        bias_prior (SpatialPrior, optional): Of the sum, beside that of a product.
        hw (Tuple[int, int]): The grid (H, W).
        device (torch.device, optional): For priors without parameters.
        rescale (Tensor, optional): (2,), factors of the coordinates.

    Returns:
        Tuple[Tensor, Optional[Tensor], Optional[Tensor]]: Their values, each
        (heads or 1, 2H-1, 2W-1), the second None without ``bias_prior``; and which
        offsets are visible, bool, None if all are.
    """
    omega = prior(hw, device, rescale)
    theta = None if bias_prior is None else bias_prior(hw, device, rescale)
    return omega, theta, prior.keep(hw, device)


class GridAttention(MultiheadAttention):
    """What the attentions that know the grid of patches have in common.

    A subclass writes ``forward(x, hw_shape, omega=None, rescale=None)`` between
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

    def set_depth(self, layer, num_layers):
        """Told by the backbone: the layer's index and the number of layers."""

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

    def fused_attention(self, q, k, v, bias=None):
        """torch's scaled_dot_product_attention, with a bias of all pairs or without."""
        usual = self.head_dims**-0.5
        if self.scale != usual:  # torch 2.1 exports no `scale` to ONNX
            q = q * (self.scale / usual)
        dropout_p = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p)

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
    """Spatial Prior-enhanced Self-Attention (SP-SA), and its additive counterparts.

    For head h, with the scores S = Q_h K_h^T / sqrt(d) and a prior's values Omega
    (paper, section 3):

        multiply:  A_h = softmax(Omega * S)                                SP-SA
        add:       A_h = softmax(S + strength * (Omega - 1))
        both:      A_h = softmax(Omega * S + strength * (Theta - 1))
        out = concat_h(A_h V_h) W_o

    The product is element-wise. Theta is a second prior of the same config. The value 1
    is neutral for both, so with a prior that starts at 1 a new attention computes
    exactly vanilla self-attention. With a score c (``init_score``), a product is

        Omega * (S + c)  =  Omega * S + c * Omega,

    a product and a sum: compare it with ``combine='add', strength=c`` from the same
    start.

    Args:
        embed_dims (int): The embedding dimension.
        num_heads (int): Parallel attention heads; must divide ``embed_dims``.
        prior (dict, optional): Config of the spatial prior. None for one that
            is handed to :meth:`forward`. Defaults to
            ``dict(type='MLPSpatialPrior')``.
        combine (str): 'multiply', 'add' or 'both'. Defaults to 'multiply'.
        strength (float): Factor of what is added; a product has none.
            Defaults to 1.
        num_extra_tokens (int): Class and other tokens in front of the patch
            tokens; pairs that involve them take the neutral value, and are always
            visible. Defaults to 0.
        grid (Tuple[int, int], optional): The grid (H, W) at training, for
            priors that want to know it. Defaults to None.
        qk_scale (float, optional): Factor of the scores in place of
            ``head_dims ** -0.5``. Defaults to None.
        attn_impl (str): The kernel, see
            :func:`spvit_mm.ops.spatial_prior_attention`. Defaults to 'auto'.
        init_score (float): A score c that all pairs start with, for a prior to
            multiply: it learns where to look before content does. With
            ``qkv_bias=False`` it is a learned scalar for each head. Else it comes from
            the biases of queries and keys, which meet the content, too: S then has
            terms of one token alone. Defaults to 0.
        masked (bool): Whether each head has a mask of its own, the buffer ``kept``: it
            attends to patches at the offsets that are kept and to extra tokens. All are
            at first; a checkpoint of tools/model_converters/sparsify_priors.py or
            :meth:`set_kept` says which. On another grid than its own a mask holds for
            the same offsets in patches, and further ones are masked. Defaults to False.
        **kwargs: ``attn_drop``, ``proj_drop``, ``dropout_layer``,
            ``qkv_bias``, ``proj_bias``, ``v_shortcut``, ``input_dims``,
            ``layer_scale_init_value``, ``init_cfg`` of mmpretrain's
            MultiheadAttention.

    Raises:
        ValueError: If ``embed_dims`` is not divisible by ``num_heads``, the prior has
            neither one map nor one per head, or an argument does not fit ``combine``.
    """

    COMBINES = ('multiply', 'add', 'both')

    def __init__(
        self,
        embed_dims,
        num_heads,
        prior=dict(type='MLPSpatialPrior'),
        combine='multiply',
        strength=1.0,
        num_extra_tokens=0,
        grid=None,
        qk_scale=None,
        attn_impl='auto',
        init_score=0.0,
        masked=False,
        **kwargs,
    ):
        super().__init__(
            embed_dims, num_heads, num_extra_tokens, grid, qk_scale, **kwargs
        )
        check_choice('combine', combine, self.COMBINES)
        check_choice('attn_impl', attn_impl, ATTN_IMPLS)
        if combine == 'multiply' and strength != 1:
            raise ValueError(
                '`strength` is the factor of what is added, and a product adds nothing, '
                f"got strength={strength} with combine='multiply'. Its start is set by "
                "`init_score`, or take combine='add' or 'both'."
            )
        self.combine = combine
        self.strength = strength
        self.attn_impl = attn_impl
        self.init_score = init_score
        if init_score < 0 or (init_score and combine == 'add'):
            raise ValueError(
                '`init_score` must be at least 0, and is a score for a prior to '
                f'multiply, got init_score={init_score} with combine={combine!r}. The '
                'start of a sum is set by `strength`.'
            )
        self.score = None
        if init_score and self.qkv.bias is None:
            # One axis, so that weight decay on matrices only leaves it alone.
            self.score = nn.Parameter(torch.empty(num_heads))
        self.prior = self.bias_prior = None
        if prior is not None:
            self.prior = build_prior(prior, num_heads, self.grid, combine)
            if combine == 'both':
                self.bias_prior = build_prior(prior, num_heads, self.grid, combine)
        self.register_buffer('kept', None)
        if masked:
            if self.grid is None:
                raise ValueError('`masked=True` needs `grid`, the (H, W) of the masks.')
            self.kept = self._all_kept()
        self.reset_score()

    def set_depth(self, layer, num_layers):
        for prior in (self.prior, self.bias_prior):
            if prior is not None:
                prior.set_depth(layer, num_layers)

    @torch.no_grad()
    def reset_score(self):
        """Start all pairs with ``init_score``."""
        if self.score is not None:
            self.score.fill_(self.init_score)
        elif self.init_score:
            each = (self.init_score / (self.scale * self.head_dims)) ** 0.5
            self.qkv.bias[: 2 * self.embed_dims].fill_(each)

    def init_weights(self):
        super().init_weights()
        self.reset_score()

    def forward(self, x, hw_shape, omega=None, rescale=None):
        """Attend.

        Args:
            x (Tensor): Tokens (B, T, C), T = num_extra_tokens + H * W, the
                extra tokens in front and the patches in row-major order.
            hw_shape (Tuple[int, int]): The grid (H, W).
            omega (Tensor | Tuple, optional): The prior's table (heads or 1, 2H-1,
                2W-1), or all that :func:`evaluate_priors` returns, instead of this
                layer's own priors.
            rescale (Tensor, optional): (2,), factors of the coordinates.

        Returns:
            Tensor: (B, T, C).

        Raises:
            ValueError: If T does not fit the grid.
        """
        q, k, v = self.project_qkv(x, hw_shape)
        prior, bias, keep = self.score_tables(hw_shape, x.device, omega, rescale)
        out = spatial_prior_attention(
            q,
            k,
            v,
            prior,
            hw_shape,
            bias=bias,
            keep=keep,
            scale=self.scale,
            num_extra_tokens=self.num_extra_tokens,
            dropout_p=self.attn_drop if self.training else 0.0,
            attn_impl=self.attn_impl,
        )
        return self.merge_heads(out, v)

    def score_tables(self, hw, device=None, omega=None, rescale=None):
        """What this attention makes of its scores S, by the offset of a pair.

        Arguments as in :meth:`forward`, with the grid (H, W) and where priors without
        parameters are computed.

        Returns:
            Tuple[Optional[Tensor], ...]: ``prior``, ``bias`` and ``keep`` of
            :func:`spvit_mm.ops.spatial_prior_attention`: what multiplies S, what is
            then added, and which offsets are visible; each (heads or 1, 2H-1, 2W-1),
            or None where it changes nothing.
        """
        if omega is None and self.prior is not None:
            omega = evaluate_priors(self.prior, self.bias_prior, hw, device, rescale)
        elif omega is None or isinstance(omega, torch.Tensor):
            omega = (omega, None, None)
        prior, bias, keep = self._combine(*omega)
        if self.kept is not None:
            kept = fit_mask(self.kept, hw)
            keep = kept if keep is None else keep & kept
        return prior, bias, keep

    def _combine(self, omega, theta, keep):
        if omega is None or self.combine == 'add':
            bias = None if omega is None else self.strength * (omega - 1)
            return None, bias, keep
        bias = None if theta is None else self.strength * (theta - 1)
        if self.score is not None:
            # Omega * (S + c) less c: a softmax sees no constant, and the pairs of
            # extra tokens keep S.
            score = self.score.to(omega.dtype).view(-1, 1, 1) * (omega - 1)
            bias = score if bias is None else bias + score
        return omega, bias, keep

    def _all_kept(self):
        size = (2 * self.grid[0] - 1, 2 * self.grid[1] - 1)
        return torch.ones(self.num_heads, *size, dtype=torch.bool)

    def set_kept(self, kept):
        """Mask all offsets but those that are kept.

        Args:
            kept (Tensor): (heads, 2H-1, 2W-1), bool, of any grid (H, W), True at the
                zero offset.

        Raises:
            ValueError: If it is no such table.
        """
        self._check_kept(kept)
        device = self.qkv.weight.device
        # A buffer born in inference mode could not enter a later training.
        with torch.inference_mode(False):
            self.kept = kept.detach().clone().to(device)

    def _check_kept(self, kept):
        if kept.dim() != 3 or len(kept) != self.num_heads:
            raise ValueError(
                f'The masks must be (heads, 2H-1, 2W-1) for {self.num_heads} heads, but '
                f'are {tuple(kept.shape)}.'
            )
        check_keep(kept, [(side + 1) // 2 for side in kept.shape[1:]])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        kept = state_dict.get(f'{prefix}kept')
        if self.kept is not None and kept is None:
            if f'{prefix}qkv.weight' in state_dict:  # of a model without masks
                self.set_kept(self._all_kept())
                state_dict[f'{prefix}kept'] = self.kept
        elif kept is not None and self.kept is not None:
            try:
                self.set_kept(kept)
            except ValueError as error:
                raise CheckpointError(
                    f'The masks of {prefix.rstrip(".")!r} in the checkpoint cannot be '
                    f'taken: {error}'
                ) from error
        super()._load_from_state_dict(state_dict, prefix, *args)


def fit_mask(kept, hw):
    """Masks on another grid: offsets in patches stay, and further ones are masked.

    Args:
        kept (Tensor): (heads, 2H-1, 2W-1), bool, of a grid (H, W).
        hw (Tuple[int, int]): The other grid (H', W').

    Returns:
        Tensor: (heads, 2H'-1, 2W'-1); ``kept`` itself on its own grid.
    """
    if is_free(hw):  # how much is to be padded or cut cannot be asked
        for dim, side in enumerate(hw, 1):
            far = kept.shape[dim] // 2
            offset = torch.arange(1 - side, side, device=kept.device)
            inside = (offset.abs() <= far).unflatten(0, (-1,) + (1,) * (2 - dim))
            kept = kept.index_select(dim, (offset + far).clamp(0, 2 * far)) & inside
        return kept
    more_rows, more_cols = (
        side - (size + 1) // 2 for side, size in zip(hw, kept.shape[1:], strict=True)
    )
    if not more_rows and not more_cols:
        return kept
    return F.pad(kept, (more_cols, more_cols, more_rows, more_rows), value=False)


def build_prior(cfg, num_heads, grid, combine):
    """Build a prior for an attention of so many heads.

    Args:
        cfg (dict): Its config.
        num_heads (int): Heads of the attention.
        grid (Tuple[int, int], optional): The grid (H, W) at training.
        combine (str): As of :class:`SpatialPriorAttention`.

    Returns:
        SpatialPrior: The prior.

    Raises:
        ValueError: If an attention cannot take it.
    """
    prior = build_child(cfg, 'prior', num_heads=num_heads, grid=grid)
    if prior.num_heads not in (1, num_heads):
        raise ValueError(
            f'`prior` has num_heads={prior.num_heads}, but an attention '
            f'of {num_heads} heads takes a prior of 1 or {num_heads}.'
        )
    if combine != 'add' and prior.is_bias:
        raise ValueError(
            f'{type(prior).__name__} is a bias, which is added to the scores, got '
            f"combine={combine!r}. Take attn_cfg=dict(combine='add')."
        )
    window = isinstance(prior, WindowSpatialPrior)
    hard = window and not prior.soft and not prior.masked
    if combine != 'multiply' and hard:
        raise ValueError(
            f'`combine={combine!r}` cannot take a hard WindowSpatialPrior: its 0 and 1 '
            'are no bias, they choose what is multiplied. Take masked=True to mask what '
            "lies outside, soft=True for a bias, or combine='multiply'."
        )
    return prior
