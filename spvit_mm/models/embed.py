"""The convolution stem of LV-ViT and the positional encoding generator of CPVT."""

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.model import BaseModule
from mmengine.utils import to_2tuple
from mmpretrain.registry import MODELS


@MODELS.register_module()
class ConvStem(BaseModule):
    """LV-ViT's stem (https://arxiv.org/abs/2104.10858): four convolutions.

    conv 7x7 / 2, conv 3x3, conv 3x3, each with batch norm and ReLU, then a
    convolution with kernel and stride of half a patch. It takes the place of
    mmcv's PatchEmbed and, like it, pads an image on its right and bottom to a
    multiple of the patch.

    Args:
        in_channels (int): Channels of the image. Defaults to 3.
        embed_dims (int): Width of the tokens. Defaults to 384.
        patch_size (int | Tuple[int, int]): Patch size in pixels, even.
            Defaults to 16.
        stem_channels (int): Width of the first three convolutions.
            Defaults to 64.
        input_size (int | Tuple[int, int]): Image size at training, in pixels.
            Defaults to 224.
        norm_cfg (dict): Config of the normalization.
            Defaults to ``dict(type='BN')``.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    def __init__(
        self,
        in_channels=3,
        embed_dims=384,
        patch_size=16,
        stem_channels=64,
        input_size=224,
        norm_cfg=dict(type='BN'),
        init_cfg=None,
    ):
        super().__init__(init_cfg=init_cfg)
        patch_size = to_2tuple(patch_size)
        if any(side < 2 or side % 2 for side in patch_size):
            raise ValueError(
                '`patch_size` must be even for the convolution stem, whose first '
                f'convolution has stride 2, got {patch_size}.'
            )
        self.embed_dims = embed_dims
        self.padding = AdaptivePadding(patch_size, patch_size, padding='corner')
        common = dict(norm_cfg=norm_cfg, bias=False)
        self.conv1 = ConvModule(
            in_channels, stem_channels, 7, stride=2, padding=3, **common
        )
        self.conv2 = ConvModule(stem_channels, stem_channels, 3, padding=1, **common)
        self.conv3 = ConvModule(stem_channels, stem_channels, 3, padding=1, **common)
        half = (patch_size[0] // 2, patch_size[1] // 2)
        self.projection = build_conv_layer(
            None, stem_channels, embed_dims, kernel_size=half, stride=half
        )
        self.init_input_size = to_2tuple(input_size)
        self.init_out_size = tuple(
            -(-side // patch)
            for side, patch in zip(self.init_input_size, patch_size, strict=True)
        )

    def forward(self, x):
        """Turn images (B, in_channels, h, w) into tokens.

        Returns:
            Tuple[Tensor, Tuple[int, int]]: The tokens (B, H * W, embed_dims)
            and their grid (H, W).
        """
        x = self.conv3(self.conv2(self.conv1(self.padding(x))))
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


@MODELS.register_module()
class PEG(BaseModule):
    """Positional encoding generator of CPVT (https://arxiv.org/abs/2102.10882).

    A 3x3 depth-wise convolution over the grid, plus identity. Class and other
    extra tokens in front pass untouched.

    Args:
        embed_dims (int): Width of the tokens.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    def __init__(self, embed_dims, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.proj = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def forward(self, x, hw_shape):
        """Add position to tokens (B, T, C) of the grid ``hw_shape`` (H, W)."""
        height, width = hw_shape
        num_extra_tokens = x.shape[1] - height * width
        grid = x[:, num_extra_tokens:]
        # (B, N, C) -> (B, C, H, W), a view that is channels-last in memory
        image = grid.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        position = self.proj(image).flatten(2).transpose(1, 2)
        if torch.is_grad_enabled() or position.dtype != grid.dtype:
            grid = grid + position
        else:
            grid = position.add_(grid)  # nobody else holds it
        if not num_extra_tokens:
            return grid
        return torch.cat((x[:, :num_extra_tokens], grid), dim=1)
