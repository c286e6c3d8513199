"""The convolution stem of LV-ViT and the positional encoding generator of CPVT."""

from collections import OrderedDict

import torch
import torch.nn as nn
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import AdaptivePadding, PatchEmbed
from mmengine.model import BaseModule
from mmengine.utils import to_2tuple
from mmpretrain.registry import MODELS

from .builder import build_child


def build_stem(
    stem, in_channels, embed_dims, img_size, patch_size, bias=True, patch_cfg=dict()
):
    """The module that cuts an image into tokens.

    Args:
        stem (str | dict): 'patch' (mmcv's PatchEmbed), 'conv' (:class:`ConvStem`) or
            the config of a stem.
        in_channels (int): Channels of the image.
        embed_dims (int): Width of the tokens.
        img_size (int | Tuple[int, int]): Image size (h, w) at training, in pixels.
        patch_size (int | Tuple[int, int]): Patch size in pixels.
        bias (bool): Whether PatchEmbed has one. Defaults to True.
        patch_cfg (dict): More arguments of the stem, which win.

    Returns:
        nn.Module: Called with images (B, in_channels, h, w), it returns the tokens
        (B, H * W, embed_dims) and their grid (H, W); ``init_out_size`` is the grid at
        training.

    Raises:
        ValueError: If ``stem`` is none of these.
    """
    if stem == 'patch':
        cfg = dict(
            in_channels=in_channels,
            input_size=img_size,
            embed_dims=embed_dims,
            conv_type='Conv2d',
            kernel_size=patch_size,
            stride=patch_size,
            bias=bias,
        )
        return PatchEmbed(**{**cfg, **patch_cfg})
    if stem == 'conv':
        stem = dict(type='ConvStem')
    if not isinstance(stem, dict):
        raise ValueError(
            f"`stem` must be 'patch', 'conv' or the config of a ConvStem, got {stem!r}."
        )
    return build_child(
        {**stem, **patch_cfg},
        'stem',
        in_channels=in_channels,
        embed_dims=embed_dims,
        patch_size=patch_size,
        input_size=img_size,
    )


def conv_block(in_channels, out_channels, kernel_size, stride, norm_cfg):
    """Convolution without bias, norm and ReLU, under the names of mmcv's ConvModule.

    ConvModule starts its convolution with Kaiming; the released stem starts as
    torch's nn.Conv2d does.
    """
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
    )
    name, norm = build_norm_layer(norm_cfg, out_channels)
    return nn.Sequential(
        OrderedDict([('conv', conv), (name, norm), ('activate', nn.ReLU(inplace=True))])
    )


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
        self.conv1 = conv_block(in_channels, stem_channels, 7, 2, norm_cfg)
        self.conv2 = conv_block(stem_channels, stem_channels, 3, 1, norm_cfg)
        self.conv3 = conv_block(stem_channels, stem_channels, 3, 1, norm_cfg)
        half = (patch_size[0] // 2, patch_size[1] // 2)
        self.projection = nn.Conv2d(stem_channels, embed_dims, half, stride=half)
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
        grid = grid + position
        if not num_extra_tokens:
            return grid
        return torch.cat((x[:, :num_extra_tokens], grid), dim=1)
