"""SP-ViT: a vision transformer whose first layers attend with spatial priors."""

import math

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import ModuleList
from mmengine.utils import to_2tuple
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import resize_pos_embed
from mmpretrain.registry import MODELS
from torch.utils.checkpoint import checkpoint

from .attention import SpatialPriorAttention, check_heads
from .builder import build_child, resolve_type
from .embed import PEG
from .priors import ConstantSpatialPrior, SpatialPrior


def is_int(value):
    """Whether it is a whole number; True and False are taken for a mistake."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


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

    def forward(self, x, hw_shape, omega=None):
        """Map tokens (B, T, C) of the grid ``hw_shape`` to tokens (B, T, C).

        ``omega`` is the table of a prior that the whole network shares.
        """
        y = self.ln1(x)
        y = self.attn(y, hw_shape, omega) if self.takes_grid else self.attn(y)
        x = torch.add(x, y, alpha=self.branch_scale)
        x = torch.add(x, self.ffn(self.ln2(x)), alpha=self.branch_scale)
        return x if self.peg is None else self.peg(x, hw_shape)


def _lvvit_arch(embed_dims, num_layers, num_heads, stem_channels, skip_scale):
    """LV-ViT's skeleton as the released SP-ViT uses it (head width 64)."""
    return dict(
        embed_dims=embed_dims,
        num_layers=num_layers,
        num_heads=num_heads,
        feedforward_channels=embed_dims * 3,
        stem=dict(type='ConvStem', stem_channels=stem_channels),
        skip_scale=skip_scale,
        with_peg=True,
        qkv_bias=False,
        norm_cfg=dict(type='LN', eps=1e-5),
        prior=dict(type='MLPSpatialPrior', hidden_dims=64),
    )


@MODELS.register_module()
class SPViT(VisionTransformer):
    """SP-ViT: vision transformer with learned 2D spatial priors.

    A PyTorch implementation of: `SP-ViT: Learning 2D Spatial Priors for Vision
    Transformers <https://arxiv.org/abs/2206.07662>`_ (BMVC 2022).

    The first ``num_spsa_layers`` layers are SP-SA, the others vanilla. With
    ``num_spsa_layers=0`` and the class token first it is mmpretrain's
    VisionTransformer and loads its weights. Any height and width of the image
    is taken, at any time.

    An argument left at None takes the value of the ``arch``, where that has
    one (the ``spvit-*`` archs imply stem, PEG, skip scale, no qkv bias, eps
    1e-5 and hidden width 64), and else the default of a DeiT; one that is
    given wins.

    Args:
        arch (str | dict): One of VisionTransformer's archs, 'deit-small-9h'
            (ConViT-S's shape), 'spvit-small', 'spvit-medium', 'spvit-large',
            or a dict with ``embed_dims``, ``num_layers``, ``num_heads`` and
            ``feedforward_channels``. Defaults to 'deit-small'.
        img_size (int | Tuple[int, int]): Image size (h, w) at training.
            Defaults to 224.
        patch_size (int | Tuple[int, int]): Defaults to 16.
        in_channels (int): Defaults to 3.
        num_spsa_layers (int, optional): How many of the first layers are
            SP-SA. Defaults to None: all but the last two.
        prior (dict, optional): Config of the spatial prior. Defaults to None:
            ``dict(type='MLPSpatialPrior')``, with the arch's hidden width.
        attn_cfg (dict, optional): Config of the attention of those layers: a
            registered module that is built with the arguments of
            :class:`SpatialPriorAttention` but ``prior``, and called with the
            tokens, the grid and a shared prior's table or None. Without a
            ``type``, as in ``dict(attn_impl='eager')``, it is that class.
            Defaults to None: ``dict(type='SpatialPriorAttention')``.
        share_prior (str): ``'none'``: one prior per head and layer. ``'heads'``:
            one per layer for all its heads. ``'network'``: one set for the
            whole network. Defaults to 'none'.
        cls_token_layer (int, optional): The class token joins before this
            layer (0: first). Defaults to None: after the SP-SA layers.
        pos_embed (str, optional): ``'learned'``: an absolute embedding, resized
            to any grid. None: no embedding, position comes from the priors
            and the PEG alone. Defaults to 'learned'.
        stem (str | dict, optional): ``'patch'`` (one convolution), ``'conv'``
            (LV-ViT's), or the config of a :class:`ConvStem`.
            Defaults to None (the arch's, else 'patch').
        with_peg (bool, optional): Whether a PEG follows every layer.
            Defaults to None (the arch's, else False).
        skip_scale (float, optional): Divisor of the residual branches.
            Defaults to None (the arch's, else 1).
        with_cp (bool): Activation checkpointing: recompute every layer in the
            backward pass and save its memory. Defaults to False.
        out_indices (Sequence[int] | int): The layers whose output is returned.
            Layers behind the last of them are not run, and are frozen.
            Defaults to -1, the last.
        out_type (str): 'cls_token', 'featmap', 'avg_featmap' or 'raw', as in
            VisionTransformer. 'raw' holds the class token where it has joined.
            Defaults to 'cls_token'.
        with_cls_token (bool): Defaults to True.
        frozen_stages (int): Freeze this many layers and the stem (they stay in
            eval mode, too), and with them a prior that the whole network
            shares, whose table they use. 0 and -1 freeze nothing.
            Defaults to -1.
        freeze_all_but_priors (bool): Let nothing of the backbone learn but its
            spatial priors; the rest stays in eval mode. With a head, these are
            a few thousand parameters to fit a pretrained model to new images.
            Defaults to False.
        final_norm (bool): Defaults to True.
        qkv_bias (bool, optional): Defaults to None (the arch's, else True).
        norm_cfg (dict, optional): Defaults to None (the arch's, else
            ``dict(type='LN', eps=1e-6)``).
        drop_rate (float): Defaults to 0.
        drop_path_rate (float): Stochastic depth, rising linearly from 0 to
            this over the layers. Defaults to 0.
        layer_scale_init_value (float): Defaults to 0 (no layer scale).
        interpolate_mode (str): How the position embedding is resized.
            Defaults to 'bicubic'.
        pre_norm (bool): A norm before the layers. Defaults to False.
        patch_cfg (dict): More arguments of the stem; they win over those of
            ``stem``. Defaults to an empty dict.
        layer_cfgs (Sequence[dict] | dict): More arguments of the layers.
            Defaults to an empty dict.
        deploy (bool): Whether every prior is a table of constants for one grid, as
            :meth:`switch_to_deploy` makes it. Such a model loads what a switched
            model has saved, and takes the grid from there. Defaults to False.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Example:
        >>> import torch
        >>> from mmpretrain.registry import MODELS
        >>> import spvit_mm
        >>> model = MODELS.build(dict(type='SPViT', arch='deit-tiny'))
        >>> model(torch.rand(1, 3, 224, 160))[0].shape
        torch.Size([1, 192])
    """

    arch_zoo = {
        **VisionTransformer.arch_zoo,
        'deit-small-9h': dict(
            embed_dims=432, num_layers=12, num_heads=9, feedforward_channels=1728
        ),
        'spvit-small': _lvvit_arch(384, 16, 6, 64, 2.0),
        'spvit-medium': _lvvit_arch(512, 20, 8, 64, 2.0),
        'spvit-large': _lvvit_arch(768, 24, 12, 128, 3.0),
    }
    INTERPOLATE_MODES = ('bilinear', 'bicubic')
    SHARE_MODES = ('none', 'heads', 'network')

    def __init__(
        self,
        arch='deit-small',
        img_size=224,
        patch_size=16,
        in_channels=3,
        num_spsa_layers=None,
        prior=None,
        attn_cfg=None,
        share_prior='none',
        cls_token_layer=None,
        pos_embed='learned',
        stem=None,
        with_peg=None,
        skip_scale=None,
        with_cp=False,
        out_indices=-1,
        out_type='cls_token',
        with_cls_token=True,
        frozen_stages=-1,
        freeze_all_but_priors=False,
        final_norm=True,
        qkv_bias=None,
        norm_cfg=None,
        drop_rate=0.0,
        drop_path_rate=0.0,
        layer_scale_init_value=0.0,
        interpolate_mode='bicubic',
        pre_norm=False,
        patch_cfg=dict(),
        layer_cfgs=dict(),
        deploy=False,
        init_cfg=None,
    ):
        settings = arch
        if isinstance(arch, str):
            settings = self.arch_zoo.get(arch.lower(), arch)

        self._check_numbers(
            img_size, patch_size, skip_scale, drop_path_rate, interpolate_mode
        )

        def choose(name, given, default):
            if given is not None or not isinstance(settings, dict):
                return given
            return settings.get(name, default)

        norm_cfg = choose('norm_cfg', norm_cfg, dict(type='LN', eps=1e-6))
        # The parent checks the arch and makes stem, tokens, position and norms
        # of a model without layers; the layers are ours.
        super().__init__(
            arch={**settings, 'num_layers': 0}
            if isinstance(settings, dict) and 'num_layers' in settings
            else arch,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=[],
            drop_rate=drop_rate,
            norm_cfg=norm_cfg,
            final_norm=final_norm,
            out_type=out_type,
            with_cls_token=with_cls_token,
            interpolate_mode=interpolate_mode,
            patch_cfg={} if choose('stem', stem, 'patch') != 'patch' else patch_cfg,
            pre_norm=pre_norm,
            init_cfg=init_cfg,
        )
        self.arch_settings = settings
        self.num_layers = settings['num_layers']
        check_heads(self.embed_dims, settings['num_heads'])

        stem = choose('stem', stem, 'patch')
        if isinstance(stem, str) and stem not in ('patch', 'conv'):
            raise ValueError(
                "`stem` must be 'patch', 'conv' or the config of a ConvStem, "
                f'got {stem!r}.'
            )
        if stem != 'patch':
            stem = dict(type='ConvStem') if stem == 'conv' else stem
            if isinstance(stem, dict):
                stem = {**stem, **patch_cfg}
            self.patch_embed = build_child(
                stem,
                'stem',
                in_channels=in_channels,
                embed_dims=self.embed_dims,
                patch_size=patch_size,
                input_size=img_size,
            )
            self.patch_resolution = self.patch_embed.init_out_size

        self.num_spsa_layers = self._check_num_spsa_layers(num_spsa_layers)
        self.out_indices = self._check_out_indices(out_indices)
        self.cls_token_layer = self._check_cls_token_layer(cls_token_layer)
        self._init_position(pos_embed)

        if share_prior not in self.SHARE_MODES:
            raise ValueError(
                f'`share_prior` must be one of {self.SHARE_MODES}, got {share_prior!r}.'
            )
        self.share_prior = share_prior
        self.prior = None
        attn_cfg = self._attention_cfg(attn_cfg, prior, choose)
        self.with_cp = with_cp
        self._init_layers(
            attn_cfg,
            layer_cfgs,
            drop_path_rate,
            drop_rate=drop_rate,
            qkv_bias=choose('qkv_bias', qkv_bias, True),
            norm_cfg=norm_cfg,
            skip_scale=choose('skip_scale', skip_scale, 1.0),
            with_peg=choose('with_peg', with_peg, False),
            layer_scale_init_value=layer_scale_init_value,
        )

        if not is_int(frozen_stages) or not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(
                f'`frozen_stages` must be an integer in -1..{self.num_layers} (the '
                f'number of layers), got {frozen_stages!r}.'
            )
        self.frozen_stages = frozen_stages
        self.freeze_all_but_priors = freeze_all_but_priors
        if freeze_all_but_priors:
            if not any(isinstance(m, SpatialPrior) for m in self.modules()):
                raise ValueError(
                    '`freeze_all_but_priors` would freeze everything: the backbone '
                    'has no spatial prior. Set `num_spsa_layers` to 1 or more.'
                )
            if frozen_stages > 0:
                raise ValueError(
                    '`freeze_all_but_priors` and `frozen_stages` exclude each other, '
                    f'got frozen_stages={frozen_stages}. Leave it at -1.'
                )
            self._freeze_all_but_priors()
        if self.frozen_stages > 0:
            self._freeze_stages()
        self.deploy = False
        if deploy:
            self.switch_to_deploy()

    # ---------------------------------------------------------- construction

    def _check_numbers(
        self, img_size, patch_size, skip_scale, drop_path_rate, interpolate_mode
    ):
        for name, value in (('img_size', img_size), ('patch_size', patch_size)):
            sides = to_2tuple(value)
            if len(sides) != 2 or any(not is_int(side) or side < 1 for side in sides):
                raise ValueError(
                    f'`{name}` must be a positive integer or two of them (h, w), in '
                    f'pixels, got {value!r}.'
                )
        if skip_scale is not None and not skip_scale > 0:
            raise ValueError(f'`skip_scale` must be above 0, got {skip_scale!r}.')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'`drop_path_rate` must lie in [0, 1), got {drop_path_rate!r}.'
            )
        if interpolate_mode not in self.INTERPOLATE_MODES:
            raise ValueError(
                f'`interpolate_mode` must be one of {self.INTERPOLATE_MODES}, '
                f'got {interpolate_mode!r}.'
            )

    def _check_num_spsa_layers(self, value):
        if value is None:
            return max(self.num_layers - 2, 0)
        if not is_int(value) or not 0 <= value <= self.num_layers:
            raise ValueError(
                f'`num_spsa_layers` must be an integer in 0..{self.num_layers} (the '
                f'number of layers), got {value!r}.'
            )
        return int(value)

    def _check_out_indices(self, value):
        """The layers to return, counted from 0, in a list of our own."""
        if is_int(value):
            value = [value]
        assert isinstance(value, (list, tuple)), (
            f'"out_indices" must by a sequence or int, get {type(value)} instead.'
        )
        indices = []
        for index in value:
            is_layer = is_int(index) and -self.num_layers <= index < self.num_layers
            assert is_layer, (
                f'Invalid out_indices {index!r}, the layers are '
                f'0..{self.num_layers - 1} (or -{self.num_layers}..-1 from the end)'
            )
            indices.append(int(index) % self.num_layers)
        return indices

    def _check_cls_token_layer(self, value):
        if not self.with_cls_token:
            if value is not None:
                raise ValueError(
                    f'`cls_token_layer` is {value}, but with_cls_token=False leaves '
                    'no class token to join. Leave `cls_token_layer` at None.'
                )
            return None
        last = max(self.num_layers - 1, 0)
        if value is None:
            value = min(self.num_spsa_layers, last)
        if not is_int(value) or not 0 <= value <= last:
            raise ValueError(
                f'`cls_token_layer` must be an integer in 0..{last}, got {value!r}.'
            )
        early = [i for i in self.out_indices if i < value]
        if self.out_type == 'cls_token' and early:
            raise ValueError(
                f'`out_indices` asks for the class token after layers {early}, but it '
                f'joins before layer {value} (`cls_token_layer`). Take later layers, '
                "a smaller `cls_token_layer`, or out_type='featmap'."
            )
        return int(value)

    def _init_position(self, pos_embed):
        """Position embedding, with an entry for the class token if it is first."""
        if pos_embed not in ('learned', None):
            raise ValueError(
                f"`pos_embed` must be 'learned' or None (no embedding), "
                f'got {pos_embed!r}.'
            )
        self.num_pos_extra_tokens = 1 if self.cls_token_layer == 0 else 0
        if pos_embed is None:
            self.pos_embed = None
        else:
            num_patches = self.patch_resolution[0] * self.patch_resolution[1]
            self.pos_embed = nn.Parameter(
                torch.zeros(1, num_patches + self.num_pos_extra_tokens, self.embed_dims)
            )
        # Tells a later, differently sized model on which grid we were trained.
        self.register_buffer('train_grid', torch.tensor(self.patch_resolution))

    def _attention_cfg(self, attn_cfg, prior, choose):
        """Config of the layers' attention; builds a prior that they all share."""
        attn_cfg = {} if attn_cfg is None else attn_cfg
        if isinstance(attn_cfg, dict):
            attn_cfg = {'type': 'SpatialPriorAttention', **attn_cfg}
        takes_prior = issubclass(
            resolve_type(attn_cfg, 'attn_cfg'), SpatialPriorAttention
        )
        if not takes_prior:
            if prior is not None or self.share_prior != 'none':
                raise ValueError(
                    f'`prior` and `share_prior` belong to a SpatialPriorAttention, but '
                    f'`attn_cfg` names {attn_cfg["type"]!r}, which takes none.'
                )
            return attn_cfg
        if prior is None:
            prior = attn_cfg.get('prior')
        prior = choose('prior', prior, dict(type='MLPSpatialPrior'))
        if self.share_prior == 'heads':
            prior = {**prior, 'num_heads': 1}
        elif self.share_prior == 'network' and self.num_spsa_layers:
            self.prior = build_child(
                prior,
                'prior',
                num_heads=self.arch_settings['num_heads'],
                grid=self.patch_resolution,
            )
            prior = None
        return {**attn_cfg, 'prior': prior}

    def _init_layers(self, attn_cfg, layer_cfgs, drop_path_rate, **common):
        if isinstance(layer_cfgs, dict):
            layer_cfgs = [layer_cfgs] * self.num_layers
        if len(layer_cfgs) != self.num_layers:
            raise ValueError(
                f'`layer_cfgs` must be one dict or one for each of the '
                f'{self.num_layers} layers, got {len(layer_cfgs)}.'
            )
        # Plain floats: a numpy scalar would break torch.compile's full graph.
        rates = np.linspace(0, drop_path_rate, self.num_layers).tolist()
        self.layers = ModuleList()
        for i, (rate, layer_cfg) in enumerate(zip(rates, layer_cfgs, strict=True)):
            has_cls_token = self.with_cls_token and i >= self.cls_token_layer
            cfg = dict(
                embed_dims=self.embed_dims,
                num_heads=self.arch_settings['num_heads'],
                feedforward_channels=self.arch_settings['feedforward_channels'],
                attn_cfg=attn_cfg if i < self.num_spsa_layers else None,
                num_extra_tokens=self.num_extra_tokens if has_cls_token else 0,
                grid=self.patch_resolution,
                drop_path_rate=rate,
                **common,
            )
            self.layers.append(SPViTLayer(**{**cfg, **layer_cfg}))
        self._freeze_unused()

    def _freeze_unused(self):
        """Freeze what no output depends on: DDP would wait for its gradients."""
        last = max(self.out_indices, default=-1)
        if last < 0:
            return
        unused = list(self.layers[last + 1 :])
        if last < self.num_layers - 1 and self.final_norm:
            unused.append(self.ln1)
        if self.out_type == 'cls_token' and self.layers[last].peg is not None:
            # The class token passes the last PEG untouched.
            unused.append(self.layers[last].peg)
        for module in unused:
            module.requires_grad_(False)
        if self.with_cls_token and self.cls_token_layer > last:
            self.cls_token.requires_grad = False

    # --------------------------------------------------------------- forward

    def forward(self, x):
        """Map images (B, in_channels, h, w) to a tuple of one output for each
        of ``out_indices``."""
        return self.forward_layers(*self.forward_stem(x))

    def forward_stem(self, x):
        """Stem and position embedding.

        Returns:
            Tuple[Tensor, Tuple[int, int]]: The patch tokens (B, H * W, C) and
            their grid (H, W), without any class token.
        """
        x, hw = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self._resized_pos_embed(hw)[:, self.num_pos_extra_tokens :]
        return x, hw

    def forward_layers(self, x, hw):
        """All layers, on the tokens and the grid of :meth:`forward_stem`."""
        if self.cls_token_layer == 0:
            x = self._join_cls_token(x)
        x = self.pre_norm(self.drop_after_pos(x))
        omega = None if self.prior is None else self.prior(hw, x.device)

        outs, num_outs = [], len(set(self.out_indices))
        for i, layer in enumerate(self.layers):
            if i > 0 and i == self.cls_token_layer:
                x = self._join_cls_token(x)
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, hw, omega, use_reentrant=False)
            else:
                x = layer(x, hw, omega)
            if i == self.num_layers - 1 and self.final_norm:
                x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self._format_output(x, hw))
            if len(outs) == num_outs:
                break  # what follows would be thrown away
        return tuple(outs)

    def _resized_pos_embed(self, hw):
        return resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            hw,
            mode=self.interpolate_mode,
            num_extra_tokens=self.num_pos_extra_tokens,
        )

    def _join_cls_token(self, x):
        cls_token = self.cls_token
        if self.pos_embed is not None and self.num_pos_extra_tokens:
            cls_token = cls_token + self.pos_embed[:, :1]
        return torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def _format_output(self, x, hw):
        if self.out_type in ('raw', 'cls_token'):
            return super()._format_output(x, hw)
        # Before the class token joins there is nothing to strip.
        patches = x[:, x.shape[1] - hw[0] * hw[1] :]
        if self.out_type == 'featmap':
            return patches.unflatten(1, hw).permute(0, 3, 1, 2)
        return self.ln2(patches.mean(dim=1))

    # -------------------------------------------------------------- training

    def train(self, mode=True):
        """Set the mode; frozen layers stay in eval. Returns self."""
        super().train(mode)
        if mode and self.frozen_stages > 0:
            self._freeze_stages()
        if mode and self.freeze_all_but_priors:
            self._freeze_all_but_priors()
        return self

    def _freeze_all_but_priors(self):
        priors = [m for m in self.modules() if isinstance(m, SpatialPrior)]
        learning = {id(param) for prior in priors for param in prior.parameters()}
        for param in self.parameters():
            param.requires_grad = param.requires_grad and id(param) in learning
        for module in self.modules():
            module.training = False
        for prior in priors:
            prior.train()
        # Of the backbone itself: gradient checkpointing asks for it.
        self.training = True

    def _freeze_stages(self):
        super()._freeze_stages()
        if self.prior is not None:
            self.prior.eval()
            for param in self.prior.parameters():
                param.requires_grad = False

    def get_layer_depth(self, param_name: str, prefix: str = ''):
        """The depth of a parameter, for layer-wise learning-rate decay.

        A prior that the whole network shares has depth 0, as the stem. What
        VisionTransformer does not name has the last depth, as there: of the
        backbone, that is ``pre_norm`` and the final norm.

        Returns:
            Tuple[int, int]: The depth and the number of depths.
        """
        if param_name.startswith(prefix + 'prior.'):
            return 0, self.num_layers + 2
        return super().get_layer_depth(param_name, prefix)

    # ---------------------------------------------------------------- deploy

    def switch_to_deploy(self, grid=None):
        """Fold every prior into a table of constants, in place.

        The outputs stay the same, to the bit, and no prior is computed any more.
        From then on the model takes images of that one grid. Its priors are
        constants in training too, and no optimizer of before knows the model any
        more. Once switched, it stays so: another call changes nothing.

        Args:
            grid (Tuple[int, int], optional): The grid (H, W), in patches, that the
                model will serve. Defaults to None: the grid of its training.

        Raises:
            ValueError: If ``grid`` is no grid, or the model was switched before, for
                another one.
        """
        if grid is not None and not (
            isinstance(grid, (tuple, list))
            and len(grid) == 2
            and all(isinstance(side, int) and side > 0 for side in grid)
        ):
            raise ValueError(
                '`grid` must be two positive integers, the rows and columns of '
                f'patches, got {grid!r}.'
            )
        target = tuple(self.patch_resolution if grid is None else grid)
        if self.deploy:
            for prior in self.modules():
                if not isinstance(prior, ConstantSpatialPrior) or grid is None:
                    continue
                if prior.grid != target:
                    raise ValueError(
                        f'`grid` is {target}, but this model was switched to its '
                        f'deploy form for {prior.grid}, and its priors are gone. Load '
                        'the checkpoint of the training and switch that.'
                    )
            return
        device = next(self.parameters()).device
        constants = {}
        for parent in list(self.modules()):
            for name, prior in parent.named_children():
                if isinstance(prior, SpatialPrior):
                    if prior not in constants:
                        constants[prior] = ConstantSpatialPrior.from_prior(
                            prior, target, device
                        )
                    setattr(parent, name, constants[prior])
        self.deploy = True

    # ----------------------------------------------------------- checkpoints

    def _prepare_pos_embed(self, state_dict, prefix, *args, **kwargs):
        """Fit a checkpoint's position and grid to this model, before loading."""
        name, grid_name = prefix + 'pos_embed', prefix + 'train_grid'
        if grid_name not in state_dict and name not in state_dict:
            return
        length = state_dict[name].shape[1] if name in state_dict else None
        if grid_name in state_dict:
            grid = tuple(state_dict[grid_name].tolist())
        else:
            grid = self._guess_grid(length)
        for child_name, child in self.named_modules():
            if isinstance(child, SpatialPrior) and child.coords != 'raw':
                key = f'{prefix}{child_name}.train_grid'
                state_dict.setdefault(key, torch.tensor(grid))
        state_dict[grid_name] = self.train_grid.detach().clone()
        if length is None:
            return

        logger = MMLogger.get_current_instance()
        if self.pos_embed is None:
            del state_dict[name]
            logger.info('The checkpoint has a pos_embed, this model none: left out.')
            return
        num_extra_tokens = length - grid[0] * grid[1]
        if num_extra_tokens not in (0, 1):
            raise ValueError(
                f'The checkpoint has a `pos_embed` of {length} entries for a grid of '
                f'{grid[0]} x {grid[1]} = {grid[0] * grid[1]} patches; SPViT takes '
                'none or one more, for the class token. (Distilled DeiT has two.)'
            )
        if num_extra_tokens > self.num_pos_extra_tokens:
            self._fold_cls_position(state_dict, prefix, logger)
        elif num_extra_tokens < self.num_pos_extra_tokens:
            value = state_dict[name]
            state_dict[name] = torch.cat((torch.zeros_like(value[:, :1]), value), 1)
            logger.info(
                'The checkpoint has no position entry for the class token: 0 is taken.'
            )
        if grid != tuple(self.patch_resolution):
            logger.info(
                f'Resize the pos_embed from {grid} to {tuple(self.patch_resolution)}.'
            )
            state_dict[name] = resize_pos_embed(
                state_dict[name],
                grid,
                self.patch_resolution,
                self.interpolate_mode,
                self.num_pos_extra_tokens,
            )

    def _guess_grid(self, length):
        """The grid of a pos_embed whose checkpoint does not say it: a square."""
        extra_tokens = (1, 0)
        if self.pos_embed is not None and length == self.pos_embed.shape[1]:
            extra_tokens = (self.num_pos_extra_tokens,)
        for num_extra_tokens in extra_tokens:
            side = math.isqrt(length - num_extra_tokens)
            if side > 0 and side * side == length - num_extra_tokens:
                return side, side
        # Not square, so at best it is just ours.
        return tuple(self.patch_resolution)

    def _fold_cls_position(self, state_dict, prefix, logger):
        """Take the class token's entry off the front of a pos_embed."""
        name, cls_name = prefix + 'pos_embed', prefix + 'cls_token'
        entry = state_dict[name][:, :1]
        state_dict[name] = state_dict[name][:, 1:]
        if self.with_cls_token and cls_name in state_dict:
            state_dict[cls_name] = state_dict[cls_name] + entry
            logger.info(
                'The class token joins late here and has no position: its entry in '
                "the checkpoint's pos_embed is added to cls_token."
            )
        else:
            logger.info(
                "The class token's entry in the checkpoint's pos_embed is left out."
            )
