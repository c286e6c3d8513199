"""What a model is, read off the names and shapes of its weights."""

import math
from dataclasses import dataclass
from typing import Optional

import torch

from ..utils import CheckpointError
from . import names

SOURCES = ('spvit', 'lvvit', 'deit', 'timm')

# Heads of the published models by width; else heads of 64.
HEADS = {192: 3, 216: 9, 384: 6, 432: 9, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16}
HEAD_DIMS = 64

# (depth, width) -> skip scale of the released skeletons, which no key shows.
SKIP_SCALES = {(16, 384): 2.0, (20, 512): 2.0, (24, 768): 3.0, (10, 216): 2.0}


@dataclass
class Structure:
    """The shape of a source model.

    ``pos_extra`` is the number of the position embedding's entries that belong
    to no patch, ``cls_token_layer`` None while it cannot be told, ``num_heads``
    None where no SP-SA layer shows it, ``stem_channels`` None for a one-layer
    stem, ``hidden_dims`` that of the priors.
    """

    embed_dims: int
    num_layers: int
    feedforward_channels: int
    in_channels: int
    patch_size: tuple
    stem_channels: Optional[int]
    grid: tuple
    pos_extra: int
    num_spsa_layers: int
    num_heads: Optional[int]
    hidden_dims: Optional[int]
    with_peg: bool
    qkv_bias: bool
    layer_scale: Optional[str]
    pre_logits_dims: Optional[int]
    num_classes: int
    with_aux_head: bool

    @property
    def img_size(self):
        return tuple(
            n * side for n, side in zip(self.grid, self.patch_size, strict=True)
        )

    def plain_names(self):
        """Those keys of the source that have one counterpart: theirs -> ours."""
        table = dict(names.TOKENS)
        table.update(
            names.PATCH_STEM if self.stem_channels is None else names.CONV_STEM
        )
        for i in range(self.num_layers):
            parts = [names.LAYER]
            if i < self.num_spsa_layers:
                parts.append(names.PRIOR)
            else:
                parts.append(names.QKV)
                if self.qkv_bias:
                    parts.append(names.QKV_BIAS)
            if self.with_peg:
                parts.append(names.PEG)
            if self.layer_scale:
                parts.append(names.LAYER_SCALES[self.layer_scale])
            for part in parts:
                table.update(names.numbered(part, i))
        table.update(names.NORM)
        if self.pre_logits_dims:
            table.update(names.PRE_LOGITS)
        table.update(names.HEAD)
        if self.with_aux_head:
            table.update(names.AUX_HEAD)
        return table

    def split_names(self):
        """Keys of the split projections: (qk, v) of the source -> qkv of ours."""
        return {
            (f'blocks.{i}.attn.qk.weight', f'blocks.{i}.attn.v.weight'): (
                f'backbone.layers.{i}.attn.qkv.weight'
            )
            for i in range(self.num_spsa_layers)
        }

    def shapes(self):
        """The shape that each key of the source must have."""
        width, hidden = self.embed_dims, self.feedforward_channels
        stem, patch = self.stem_channels, self.patch_size
        shapes = {
            'cls_token': (1, 1, width),
            'pos_embed': (1, self.pos_extra + self.grid[0] * self.grid[1], width),
            'patch_embed.proj.bias': (width,),
            'norm.weight': (width,),
            'norm.bias': (width,),
        }
        if stem is None:
            shapes['patch_embed.proj.weight'] = (width, self.in_channels, *patch)
        else:
            half = (patch[0] // 2, patch[1] // 2)
            shapes['patch_embed.proj.weight'] = (width, stem, *half)
            shapes['patch_embed.conv1.weight'] = (stem, self.in_channels, 7, 7)
            for n in (1, 2, 3):
                if n > 1:
                    shapes[f'patch_embed.conv{n}.weight'] = (stem, stem, 3, 3)
                for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
                    shapes[f'patch_embed.bn{n}.{leaf}'] = (stem,)
                shapes[f'patch_embed.bn{n}.num_batches_tracked'] = ()
        units = (self.num_heads or 0) * (self.hidden_dims or 0)
        block = {
            'attn.qkv.weight': (3 * width, width),
            'attn.qkv.bias': (3 * width,),
            'attn.qk.weight': (2 * width, width),
            'attn.v.weight': (width, width),
            'attn.w1.weight': (units, 2),
            'attn.w1.bias': (units,),
            'attn.w2': (units, 1),
            'attn.b2': (self.num_heads,),
            'attn.proj.weight': (width, width),
            'mlp.fc1.weight': (hidden, width),
            'mlp.fc1.bias': (hidden,),
            'mlp.fc2.weight': (width, hidden),
            'pos_block.proj.0.weight': (width, 1, 3, 3),
        }
        vectors = 'norm1.weight norm1.bias norm2.weight norm2.bias attn.proj.bias '
        vectors += (
            'mlp.fc2.bias pos_block.proj.0.bias ls1.gamma ls2.gamma gamma_1 gamma_2'
        )
        block.update(dict.fromkeys(vectors.split(), (width,)))
        for i in range(self.num_layers):
            shapes.update({f'blocks.{i}.{name}': s for name, s in block.items()})
        feats = width
        if self.pre_logits_dims:
            feats = self.pre_logits_dims
            shapes['pre_logits.fc.weight'] = (feats, width)
            shapes['pre_logits.fc.bias'] = (feats,)
        shapes['head.weight'] = (self.num_classes, feats)
        shapes['aux_head.weight'] = (self.num_classes, width)
        shapes['head.bias'] = shapes['aux_head.bias'] = (self.num_classes,)
        return shapes

    def check(self, state):
        """Raise unless ``state`` has exactly the keys and shapes of this model.

        Raises:
            CheckpointError: With every key that is missing, has no place or
                has another shape.
        """
        expected = set(self.plain_names())
        for pair in self.split_names():
            expected.update(pair)
        shapes = self.shapes()
        problems = _listed('find no place in SP-ViT', sorted(set(state) - expected))
        problems += _listed('are missing', sorted(expected - set(state)))
        odd = [
            f'{key}: {tuple(state[key].shape)} instead of {tuple(shapes[key])}'
            for key in sorted(expected & set(state))
            if tuple(state[key].shape) != tuple(shapes[key])
        ]
        problems += _listed('have an unexpected shape', odd)
        if problems:
            hint = ''
            if any(key.startswith('fc_norm.') for key in state):
                hint += (
                    '\n`fc_norm`: the model classifies by the average of its tokens, '
                    'not by the class token.'
                )
            if any(key.startswith('norm_pre.') for key in state):
                hint += (
                    '\n`norm_pre`: the model (as CLIP) has a norm before its blocks.'
                )
            raise CheckpointError(
                'The checkpoint cannot be converted; nothing was written.'
                + ''.join(problems)
                + hint
            )


def _listed(what, keys):
    return [f'\n{len(keys)} keys {what}:\n  ' + '\n  '.join(keys)] if keys else []


def detect_source(state):
    """Tell 'spvit', 'lvvit' or 'vit' (deit or timm) by the keys.

    Raises:
        CheckpointError: If it is none of them; an OpenMMLab checkpoint is told
            to need no conversion.
    """
    if any(key.startswith('backbone.') for key in state):
        raise CheckpointError(
            'This is a checkpoint of OpenMMLab, which needs no conversion: put '
            "init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone') into "
            'the backbone, or load_from=FILE. (`--to spvit` converts it to the names '
            'of the released code.)'
        )
    if any('.pos_block.' in key or '.attn.qk.' in key for key in state):
        return 'spvit'
    if 'patch_embed.conv1.weight' in state:
        return 'lvvit'
    if 'patch_embed.proj.weight' in state and any(
        k.startswith('blocks.') for k in state
    ):
        return 'vit'
    raise CheckpointError(
        'The weights are of no known model: SP-ViT, LV-ViT, DeiT and ViT of timm have '
        '`patch_embed.proj.weight` and `blocks.0.*`, this has '
        + ', '.join(list(state)[:8])
        + (', ...' if len(state) > 8 else '')
        + '.'
    )


def infer_structure(state, img_size=None):
    """Read the structure off a state dict with the released names.

    Args:
        state (Dict[str, Tensor]): Keys without any `module.`.
        img_size (Tuple[int, int], optional): The training image (h, w), which
            a grid that is not square needs. Defaults to None.

    Raises:
        CheckpointError: If a key that decides is missing, or the keys
            contradict each other.
    """

    def shape(key, ndim):
        if key not in state:
            raise CheckpointError(
                f'The checkpoint has no `{key}`, so its model cannot be told.'
            )
        if state[key].ndim != ndim:
            raise CheckpointError(
                f'`{key}` must have {ndim} dimensions, got {tuple(state[key].shape)}.'
            )
        return tuple(state[key].shape)

    width, channels, *patch = shape('patch_embed.proj.weight', 4)
    with_conv_stem = 'patch_embed.conv1.weight' in state
    stem_channels = None
    if with_conv_stem:
        stem_channels, channels = shape('patch_embed.conv1.weight', 4)[:2]
        patch = [2 * side for side in patch]

    blocks = {}
    for key in state:
        name, i = names.split_block(key)
        if i is not None:
            blocks.setdefault(i, set()).add(name)
    num_layers = max(blocks, default=-1) + 1
    spsa = [
        i for i in range(num_layers) if _has(blocks.get(i, ()), 'attn.qk.', 'attn.w2')
    ]
    if spsa != list(range(len(spsa))):
        raise CheckpointError(
            f'The SP-SA blocks must be the first ones, but are {spsa} of {num_layers}.'
        )
    num_heads = hidden_dims = None
    if spsa:
        (num_heads,) = shape('blocks.0.attn.b2', 1)
        units, _ = shape('blocks.0.attn.w2', 2)
        if not num_heads or units % num_heads or width % num_heads:
            raise CheckpointError(
                f'`blocks.0.attn.b2` says {num_heads} heads, which do not divide the '
                f'{units} rows of `blocks.0.attn.w2` and the width {width}.'
            )
        hidden_dims = units // num_heads

    length = shape('pos_embed', 3)[1]
    grid, pos_extra = _grid(length, patch, img_size)
    every = set().union(*blocks.values()) if blocks else set()
    scale = next((s for s in names.LAYER_SCALES if _has(every, f'.{s}')), None)
    pre_logits = None
    if 'pre_logits.fc.weight' in state:
        pre_logits = shape('pre_logits.fc.weight', 2)[0]
    if 'head.weight' not in state:
        raise CheckpointError(
            'The checkpoint has no classifier (`head.weight`, `head.bias`): it holds '
            'features only. Take the file with the classifier.'
        )
    return Structure(
        embed_dims=width,
        num_layers=num_layers,
        feedforward_channels=shape('blocks.0.mlp.fc1.weight', 2)[0],
        in_channels=channels,
        patch_size=tuple(patch),
        stem_channels=stem_channels,
        grid=grid,
        pos_extra=pos_extra,
        num_spsa_layers=len(spsa),
        num_heads=num_heads,
        hidden_dims=hidden_dims,
        with_peg=_has(every, '.pos_block.'),
        qkv_bias=_has(every, 'attn.qkv.bias'),
        layer_scale=scale,
        pre_logits_dims=pre_logits,
        num_classes=shape('head.weight', 2)[0],
        with_aux_head='aux_head.weight' in state,
    )


def _has(keys, *parts):
    return any(part in key for key in keys for part in parts)


def _grid(length, patch, img_size):
    """The grid (H, W) of a position embedding, and its entries for no patch."""
    if img_size is not None:
        grid = tuple(side // size for side, size in zip(img_size, patch, strict=True))
        extra = length - grid[0] * grid[1]
        if extra not in (0, 1):
            raise CheckpointError(
                f'`img_size` {tuple(img_size)} makes a grid of {grid[0]} x {grid[1]} '
                f'patches of {patch[0]} x {patch[1]}, but `pos_embed` has {length} '
                'entries (one more than patches where the class token is first).'
            )
        return grid, extra
    for extra in (0, 1):
        side = math.isqrt(max(length - extra, 0))
        if side and side * side == length - extra:
            return (side, side), extra
    raise CheckpointError(
        f'`pos_embed` has {length} entries, which make no square grid. Say the image '
        'size of the training with `--img-size H W`.'
    )


def find_heads(structure, num_heads=None):
    """The number of heads: from the priors, as given, or by the width.

    Returns:
        Tuple[int, str]: The number, and where it comes from.

    Raises:
        CheckpointError: If it cannot be told, or ``num_heads`` contradicts the
            weights.
    """
    width, known = structure.embed_dims, structure.num_heads
    if known is not None:
        if num_heads not in (None, known):
            raise CheckpointError(
                f'`num_heads` is {num_heads}, but the priors of the checkpoint (b2) are '
                f'of {known} heads. Leave it out.'
            )
        return known, 'the priors'
    if num_heads is not None:
        if num_heads < 1 or width % num_heads:
            raise CheckpointError(
                f'`num_heads` {num_heads} does not divide the width {width}.'
            )
        return num_heads, 'the option'
    if width in HEADS:
        return HEADS[width], f'the published models of width {width}'
    if width % HEAD_DIMS == 0:
        return width // HEAD_DIMS, f'heads of {HEAD_DIMS}'
    raise CheckpointError(
        f'No weight shows the number of heads, and the width {width} is none of a '
        'published model. Say it with `--num-heads N`.'
    )


def find_skip_scale(structure, skip_scale=None):
    """The divisor of the residual branches, which no weight shows.

    Raises:
        CheckpointError: If it is not given for a shape that is not released.
    """
    if skip_scale is not None:
        if not skip_scale > 0:
            raise CheckpointError(f'`skip_scale` must be positive, got {skip_scale}.')
        return float(skip_scale)
    if structure.stem_channels is None:
        return 1.0
    shape = structure.num_layers, structure.embed_dims
    if shape not in SKIP_SCALES:
        raise CheckpointError(
            f'No weight shows the skip scale, and {shape[0]} blocks of width {shape[1]} '
            'are none of the released shapes. Say it with `--skip-scale S` (released: '
            '2 for S and M, 3 for L).'
        )
    return SKIP_SCALES[shape]


def count_parameters(state):
    """Number of values in a state dict, batch norm's statistics not counted."""
    skip = ('running_mean', 'running_var', 'num_batches_tracked', 'train_grid')
    return sum(
        value.numel()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.endswith(skip)
    )
