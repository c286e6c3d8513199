"""One encoder layer of SP-ViT."""

import torch
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

from .builder import build_child
from .embed import PEG


class SPViTLayer(TransformerEncoderLayer):
    """One encoder layer of SP-ViT.

    mmpretrain's layer, where the attention may be one that knows the grid, the
    residual branches may be divided by LV-ViT's skip scale s, and a PEG may
    follow:

        x = x + attn(norm1(x)) / s
        x = x + ffn(norm2(x)) / s
        x = PEG(x)

    Args:
        embed_dims (int): The feature dimension.
        num_heads (int): Parallel attention heads.
        feedforward_channels (int): The hidden dimension of the FFN.
        attn_cfg (dict, optional): Config of an attention that takes the grid,
            as :class:`SpatialPriorAttention`. None for vanilla attention.
        skip_scale (float): Divisor s of the branches. Defaults to 1.
        with_peg (bool): Whether a PEG follows. Defaults to False.
        num_extra_tokens (int): Extra tokens in front of the patches here.
            Defaults to 0.
        grid (Tuple[int, int], optional): The grid at training.
        start (str): 'mmpretrain' (``init_weights`` starts the FFN with Xavier, as
            mmpretrain's layer does) or 'released' (the FFN starts as the model's
            ``init_cfg`` says). Defaults to 'mmpretrain'.
        **kwargs: The other arguments of mmpretrain's TransformerEncoderLayer.
    """

    def __init__(
        self,
        embed_dims,
        num_heads,
        feedforward_channels,
        attn_cfg=None,
        skip_scale=1.0,
        with_peg=False,
        num_extra_tokens=0,
        grid=None,
        start='mmpretrain',
        layer_scale_init_value=0.0,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        qkv_bias=True,
        **kwargs,
    ):
        super().__init__(
            embed_dims,
            num_heads,
            feedforward_channels,
            layer_scale_init_value=layer_scale_init_value,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            **kwargs,
        )
        # The residual sums are made here, where they can be scaled.
        self.ffn.add_identity = False
        self.branch_scale = 1.0 / skip_scale
        self.start = start
        self.takes_grid = attn_cfg is not None
        if self.takes_grid:
            self.attn = build_child(
                attn_cfg,
                'attn_cfg',
                embed_dims=embed_dims,
                num_heads=num_heads,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate,
                dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
                qkv_bias=qkv_bias,
                layer_scale_init_value=layer_scale_init_value,
                num_extra_tokens=num_extra_tokens,
                grid=grid,
            )
        self.peg = PEG(embed_dims) if with_peg else None

    def init_weights(self):
        if self.start == 'released':
            BaseModule.init_weights(self)
        else:
            super().init_weights()

    def forward(self, x, hw_shape, omega=None, rescale=None):
        """Map tokens (B, T, C) of the grid ``hw_shape`` to tokens (B, T, C).

        ``omega`` is what a prior that the whole network shares has evaluated to, and
        ``rescale`` (2,) are factors of the coordinates (x, y); both may be None.
        """
        y = self.ln1(x)
        if not self.takes_grid:
            y = self.attn(y)
        elif rescale is None:  # so an attention need not know of it
            y = self.attn(y, hw_shape, omega)
        else:
            y = self.attn(y, hw_shape, omega, rescale=rescale)
        x = torch.add(x, y, alpha=self.branch_scale)
        x = torch.add(x, self.ffn(self.ln2(x)), alpha=self.branch_scale)
        return x if self.peg is None else self.peg(x, hw_shape)
