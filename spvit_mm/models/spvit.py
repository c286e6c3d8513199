"""SP-ViT: a vision transformer whose first layers attend with spatial priors."""

import math
import re

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import ModuleList
from mmengine.model.weight_init import PretrainedInit, trunc_normal_
from mmengine.registry import DefaultScope
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.utils import build_norm_layer
from mmpretrain.registry import MODELS
from torch.utils.checkpoint import checkpoint

from ..utils import CheckpointError, safe_loader
from .attention import SpatialPriorAttention, build_prior, evaluate_priors
from .builder import resolve_type
from .checks import (
    check_choice,
    check_flags,
    check_heads,
    check_int,
    check_sides,
    is_int,
)
from .deploy import check_folded, check_grid, fold_priors
from .embed import build_stem
from .freezing import check_freezing, freeze
from .layer import SPViTLayer
from .position import draw_rescale, fit_state_dict, patch_entries

# In a state dict, of ``SpatialPriorAttention(masked=True)``.
MASK_NAME = r'layers\.(\d+)\.attn\.kept$'
# Their models are of maps, which they ask of a backbone in an assertion, if at all.
DENSE_SCOPES = ('mmseg', 'mmdet')


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
        start='released',
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
        coords_rescale (float, optional): In training, multiply the coordinates of the
            patches, before a prior's ``coords``, by one random factor a step,
            log-uniform in [1 / coords_rescale, coords_rescale], the same in all
            layers: what is learned then holds on other grids, too. Defaults to None,
            off.
        coords_jitter (float, optional): The same with a factor for each axis.
            Defaults to None, off.
        with_cp (bool): Activation checkpointing: recompute every layer in the
            backward pass and save its memory. Defaults to False.
        out_indices (Sequence[int] | int): The layers whose output is returned.
            Layers behind the last of them are not run, and are frozen.
            Defaults to -1, the last.
        out_type (str): 'cls_token', 'featmap', 'avg_featmap' or 'raw', as in
            VisionTransformer. 'raw' holds the class token where it has joined.
            mmsegmentation and mmdetection take 'featmap' alone.
            Defaults to 'cls_token'.
        with_cls_token (bool): Defaults to True.
        frozen_stages (int): Freeze this many layers and what comes before them: the
            stem, the position embedding and a class token that joins there (they stay
            in eval mode, too); and a prior that the whole network shares, whose
            table they use. 0 and -1 freeze nothing.
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
        start (str, optional): How ``init_weights`` starts what the model's
            ``init_cfg`` leaves open. ``'mmpretrain'``: as VisionTransformer, the FFN
            with Xavier and the class token at 0. ``'released'``: as SP-ViT's authors,
            every Linear and the class token truncated normal with std 0.02, biases
            0. Defaults to None (the arch's, else 'mmpretrain').
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
    STARTS = ('mmpretrain', 'released')
    # Whether a trace takes the grid of each image and not that of its example; set by
    # an export with free height and width.
    free_grid = False
    # Of what neither the arch nor an argument says.
    DEFAULTS = dict(
        stem='patch',
        with_peg=False,
        skip_scale=1.0,
        qkv_bias=True,
        norm_cfg=dict(type='LN', eps=1e-6),
        prior=dict(type='MLPSpatialPrior'),
        start='mmpretrain',
    )

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
        coords_rescale=None,
        coords_jitter=None,
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
        start=None,
        interpolate_mode='bicubic',
        pre_norm=False,
        patch_cfg=dict(),
        layer_cfgs=dict(),
        deploy=False,
        init_cfg=None,
    ):
        super(VisionTransformer, self).__init__(init_cfg)
        check_choice('share_prior', share_prior, self.SHARE_MODES)
        check_choice('interpolate_mode', interpolate_mode, self.INTERPOLATE_MODES)
        settings = self._settings(
            arch,
            stem=stem,
            with_peg=with_peg,
            skip_scale=skip_scale,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            start=start,
        )
        check_flags(
            with_peg=settings['with_peg'],
            qkv_bias=settings['qkv_bias'],
            with_cp=with_cp,
            with_cls_token=with_cls_token,
            freeze_all_but_priors=freeze_all_but_priors,
            final_norm=final_norm,
            pre_norm=pre_norm,
            deploy=deploy,
        )
        self.arch_settings = settings
        self.embed_dims = settings['embed_dims']
        self.num_layers = settings['num_layers']
        self.img_size = check_sides('img_size', img_size)
        self.interpolate_mode = interpolate_mode
        self.share_prior = share_prior
        self.final_norm = final_norm
        self.with_cp = with_cp
        for name, value in (
            ('coords_rescale', coords_rescale),
            ('coords_jitter', coords_jitter),
        ):
            if value is not None and not 1 <= value < math.inf:
                raise ValueError(
                    f'`{name}` must be None or a number of at least 1, got {value!r}.'
                )
        self.coords_rescale = coords_rescale
        self.coords_jitter = coords_jitter
        if init_cfg is None and settings['start'] == 'released':
            self.init_cfg = dict(type='TruncNormal', layer='Linear', std=0.02)

        patch_size = check_sides('patch_size', patch_size)
        if any(a < b for a, b in zip(self.img_size, patch_size, strict=True)):
            raise ValueError(
                f'`img_size` must hold at least one patch, got {self.img_size} and '
                f'patch_size={patch_size}.'
            )
        self.in_channels = in_channels
        self.patch_embed = build_stem(
            settings['stem'],
            in_channels=in_channels,
            embed_dims=self.embed_dims,
            img_size=img_size,
            patch_size=patch_size,
            bias=not pre_norm,  # as in CLIP, whose norm follows at once
            patch_cfg=patch_cfg,
        )
        self.patch_resolution = self.patch_embed.init_out_size
        self.num_spsa_layers = check_int(
            'num_spsa_layers',
            max(self.num_layers - 2, 0) if num_spsa_layers is None else num_spsa_layers,
            0,
            self.num_layers,
            'the number of layers',
        )
        if not self.num_spsa_layers and (coords_rescale or coords_jitter):
            raise ValueError(
                '`coords_rescale` and `coords_jitter` change what the attention sees of '
                'position, but with num_spsa_layers=0 it sees nothing. Leave them out.'
            )
        self._set_outputs(out_type, out_indices)
        self._init_cls_token(with_cls_token, cls_token_layer)
        self._init_position(pos_embed)
        self.drop_after_pos = nn.Dropout(p=drop_rate)

        norm_cfg = settings['norm_cfg']
        self.pre_norm = (
            build_norm_layer(norm_cfg, self.embed_dims) if pre_norm else nn.Identity()
        )
        if final_norm:
            self.ln1 = build_norm_layer(norm_cfg, self.embed_dims)
        if out_type == 'avg_featmap':
            self.ln2 = build_norm_layer(norm_cfg, self.embed_dims)
        self.prior = self.bias_prior = None
        attn_cfg = self._attention_cfg(attn_cfg, prior)
        self._init_layers(
            attn_cfg, layer_cfgs, drop_path_rate, drop_rate, layer_scale_init_value
        )

        self.frozen_stages = check_int(
            'frozen_stages', frozen_stages, -1, self.num_layers, 'the number of layers'
        )
        self.freeze_all_but_priors = freeze_all_but_priors
        check_freezing(self)
        freeze(self)
        self.deploy = False
        if deploy:
            self.switch_to_deploy()

    # ---------------------------------------------------------- construction

    def _settings(self, arch, **given):
        """What holds: an argument that is given, else the arch's value, else DeiT's."""
        if isinstance(arch, str):
            arch = arch.lower()
            assert arch in self.arch_zoo, (
                f'Arch {arch} is not in default archs {set(self.arch_zoo)}'
            )
            arch = self.arch_zoo[arch]
        essential = {'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'}
        complete = isinstance(arch, dict) and essential <= set(arch)
        assert complete, f'Custom arch needs a dict with keys {essential}'
        given = {name: value for name, value in given.items() if value is not None}
        settings = {**self.DEFAULTS, **arch, **given}
        for name in sorted(essential):
            check_int(name, settings[name], 0 if name == 'num_layers' else 1)
        check_heads(settings['embed_dims'], settings['num_heads'])
        check_choice('start', settings['start'], self.STARTS)
        if not settings['skip_scale'] > 0:
            raise ValueError(
                f'`skip_scale` must be above 0, got {settings["skip_scale"]!r}.'
            )
        return settings

    def _set_outputs(self, out_type, out_indices):
        """What is returned, and the layers, counted from 0, in a list of our own."""
        if out_type not in self.OUT_TYPES:
            raise ValueError(
                f'Unsupported `out_type` {out_type}, please choose from '
                f'{self.OUT_TYPES}'
            )
        scope = DefaultScope.get_current_instance()
        if out_type != 'featmap' and scope and scope.scope_name in DENSE_SCOPES:
            raise ValueError(
                f'The necks and heads of {scope.scope_name} take maps, and the '
                f"backbone's `out_type` is {out_type!r}. Set out_type='featmap', and "
                '`out_indices`, whose layers give a map each.'
            )
        self.out_type = out_type
        if is_int(out_indices):
            out_indices = [out_indices]
        assert isinstance(out_indices, (list, tuple)), (
            f'"out_indices" must by a sequence or int, get {type(out_indices)} instead.'
        )
        if not out_indices:
            raise ValueError('`out_indices` must name at least one layer, got none.')
        for index in out_indices:
            is_layer = is_int(index) and -self.num_layers <= index < self.num_layers
            assert is_layer, (
                f'Invalid out_indices {index!r}, the layers are '
                f'0..{self.num_layers - 1} (or -{self.num_layers}..-1 from the end)'
            )
        self.out_indices = [int(index) % self.num_layers for index in out_indices]

    def _init_cls_token(self, with_cls_token, cls_token_layer):
        self.with_cls_token = with_cls_token
        self.cls_token = self.cls_token_layer = None
        if not with_cls_token:
            if self.out_type == 'cls_token':
                raise ValueError(
                    'with_cls_token must be True when `out_type="cls_token"`.'
                )
            if cls_token_layer is not None:
                raise ValueError(
                    f'`cls_token_layer` is {cls_token_layer}, but with_cls_token=False '
                    'leaves no class token to join. Leave `cls_token_layer` at None.'
                )
            self.num_extra_tokens = 0
            return
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        last = max(self.num_layers - 1, 0)
        if cls_token_layer is None:
            cls_token_layer = min(self.num_spsa_layers, last)
        self.cls_token_layer = check_int('cls_token_layer', cls_token_layer, 0, last)
        early = [i for i in self.out_indices if i < self.cls_token_layer]
        if self.out_type == 'cls_token' and early:
            raise ValueError(
                f'`out_indices` asks for the class token after layers {early}, but it '
                f'joins before layer {self.cls_token_layer} (`cls_token_layer`). Take '
                "later layers, a smaller `cls_token_layer`, or out_type='featmap'."
            )

    def _init_position(self, pos_embed):
        """Position embedding, with an entry for the class token if it is first."""
        if pos_embed not in ('learned', None):
            raise ValueError(
                f"`pos_embed` must be 'learned' or None (no embedding), "
                f'got {pos_embed!r}.'
            )
        self.num_pos_extra_tokens = 1 if self.cls_token_layer == 0 else 0
        self.pos_embed = None
        if pos_embed == 'learned':
            length = math.prod(self.patch_resolution) + self.num_pos_extra_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, length, self.embed_dims))
        # Tells a later, differently sized model on which grid we were trained.
        self.register_buffer('train_grid', torch.tensor(self.patch_resolution))
        self._register_load_state_dict_pre_hook(self._prepare_pos_embed)

    def _attention_cfg(self, attn_cfg, prior):
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
            prior = attn_cfg.get('prior') or self.arch_settings['prior']
        if self.share_prior == 'heads':
            prior = {**prior, 'num_heads': 1}
        elif self.share_prior == 'network' and self.num_spsa_layers:
            num_heads = self.arch_settings['num_heads']
            combine = attn_cfg.get('combine', 'multiply')
            args = (prior, num_heads, self.patch_resolution, combine)
            self.prior = build_prior(*args)
            if combine == 'both':
                self.bias_prior = build_prior(*args)
            prior = None
        return {**attn_cfg, 'prior': prior}

    def _init_layers(
        self, attn_cfg, layer_cfgs, drop_path_rate, drop_rate, layer_scale_init_value
    ):
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'`drop_path_rate` must lie in [0, 1), got {drop_path_rate!r}.'
            )
        if isinstance(layer_cfgs, dict):
            layer_cfgs = [layer_cfgs] * self.num_layers
        if len(layer_cfgs) != self.num_layers:
            raise ValueError(
                f'`layer_cfgs` must be one dict or one for each of the '
                f'{self.num_layers} layers, got {len(layer_cfgs)}.'
            )
        settings = self.arch_settings
        # Plain floats: a numpy scalar would break torch.compile's full graph.
        rates = np.linspace(0, drop_path_rate, self.num_layers).tolist()
        self.layers = ModuleList()
        for i, (rate, layer_cfg) in enumerate(zip(rates, layer_cfgs, strict=True)):
            has_cls_token = self.with_cls_token and i >= self.cls_token_layer
            cfg = dict(
                embed_dims=self.embed_dims,
                num_heads=settings['num_heads'],
                feedforward_channels=settings['feedforward_channels'],
                attn_cfg=attn_cfg if i < self.num_spsa_layers else None,
                num_extra_tokens=self.num_extra_tokens if has_cls_token else 0,
                grid=self.patch_resolution,
                drop_path_rate=rate,
                drop_rate=drop_rate,
                layer_scale_init_value=layer_scale_init_value,
            )
            for name in ('qkv_bias', 'norm_cfg', 'skip_scale', 'with_peg', 'start'):
                cfg[name] = settings[name]
            self.layers.append(SPViTLayer(**{**cfg, **layer_cfg}))
            if i < self.num_spsa_layers and hasattr(self.layers[i].attn, 'set_depth'):
                self.layers[i].attn.set_depth(i, self.num_layers)

    def init_weights(self):
        """Initialize; a pretrained file is opened by ``spvit_mm.utils.safe_loader``."""
        with safe_loader(trust=None):
            # Not VisionTransformer's, which draws pos_embed anew behind a pretrained
            # file in a list.
            super(VisionTransformer, self).init_weights()
        cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        kinds = [cfg['type'] for cfg in cfgs if cfg]
        if any(kind in ('Pretrained', PretrainedInit) for kind in kinds):
            return
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        if self.arch_settings['start'] == 'released' and self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    # --------------------------------------------------------------- forward

    def forward(self, x):
        """Map images (B, in_channels, h, w) to a tuple of one output for each layer in
        ``out_indices``, in the order of the layers."""
        return self.forward_layers(*self.forward_stem(x))

    def forward_stem(self, x):
        """Stem and position embedding.

        Returns:
            Tuple[Tensor, Tuple[int, int]]: The patch tokens (B, H * W, C) and
            their grid (H, W), without any class token.
        """
        x, hw = self.patch_embed(x)
        if torch.jit.is_tracing() and not self.free_grid:
            # A trace is of the grid of its example, unless an export wants more.
            hw = tuple(int(side) for side in hw)
        if self.pos_embed is not None:
            x = x + patch_entries(
                self.pos_embed,
                self.patch_resolution,
                hw,
                self.interpolate_mode,
                self.num_pos_extra_tokens,
            )
        return x, hw

    def forward_layers(self, x, hw):
        """All layers, on the tokens and the grid of :meth:`forward_stem`."""
        if self.cls_token_layer == 0:
            x = self._join_cls_token(x)
        x = self.pre_norm(self.drop_after_pos(x))
        rescale = omega = None
        if self.training and (self.coords_rescale or self.coords_jitter):
            rescale = draw_rescale(self.coords_rescale, self.coords_jitter, x.device)
        if self.prior is not None:
            omega = evaluate_priors(self.prior, self.bias_prior, hw, x.device, rescale)

        outs, num_outs = [], len(set(self.out_indices))
        for i, layer in enumerate(self.layers):
            if i > 0 and i == self.cls_token_layer:
                x = self._join_cls_token(x)
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, hw, omega, rescale, use_reentrant=False)
            else:
                x = layer(x, hw, omega, rescale)
            if i == self.num_layers - 1 and self.final_norm:
                x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self._format_output(x, hw))
            if len(outs) == num_outs:
                break  # what follows would be thrown away
        return tuple(outs)

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

    # -------------------------------------------------------------- freezing

    def train(self, mode=True):
        """Set the mode; what is frozen stays in eval. Returns self."""
        super().train(mode)
        if mode:
            freeze(self)
        return self

    def _freeze_stages(self):
        cls_token = self.cls_token
        learns = cls_token is not None and cls_token.requires_grad
        super()._freeze_stages()
        if learns and self.cls_token_layer >= self.frozen_stages:
            cls_token.requires_grad_(True)  # it joins behind what is frozen
        for prior in (self.prior, self.bias_prior):
            if prior is not None:
                prior.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = ''):
        """The depth of a parameter, for layer-wise learning-rate decay.

        A prior that the whole network shares has depth 0, as the stem. What
        VisionTransformer does not name has the last depth, as there: of the
        backbone, that is ``pre_norm`` and the final norm.

        Returns:
            Tuple[int, int]: The depth and the number of depths.
        """
        if param_name.startswith((prefix + 'prior.', prefix + 'bias_prior.')):
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
            UserError: If ``grid`` is no grid, or the model was switched before, for
                another one.
        """
        if grid is not None:
            check_grid(grid)
        if not self.deploy:
            fold_priors(self, self.patch_resolution if grid is None else grid)
            self.deploy = True
        elif grid is not None:
            check_folded(self, grid)

    # ----------------------------------------------------------- checkpoints

    def _prepare_pos_embed(self, state_dict, prefix, *args, **kwargs):
        """Before loading: fit a checkpoint's position and grid to this model."""
        self._check_masks(state_dict, prefix)
        for change in fit_state_dict(state_dict, prefix, self):
            MMLogger.get_current_instance().info(change)

    def _check_masks(self, state_dict, prefix):
        """Refuse the masks of another model; a checkpoint without any is taken."""
        ours = [
            i
            for i, layer in enumerate(self.layers)
            if getattr(layer.attn, 'kept', None) is not None
        ]
        names = [re.match(MASK_NAME, name.removeprefix(prefix)) for name in state_dict]
        theirs = sorted(int(name[1]) for name in names if name)
        if theirs and theirs != ours:
            raise CheckpointError(
                f'The checkpoint holds masks for the layers {theirs}, and this model has '
                f'them in {ours or "none"}. Take the config that was written beside the '
                'checkpoint (`model.backbone.attn_cfg.masked=True`, and as many SP-SA '
                'layers).'
            )
