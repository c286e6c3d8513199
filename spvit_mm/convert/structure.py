"""What a model is, read off the names and shapes of its weights."""

import math

import torch
from mmpretrain.registry import MODELS
from torch import nn

from ..models import SPViT
from ..utils import CheckpointError
from . import names
from .state import to_theirs

# The published models, by one name each.
ARCHS = ('spvit-small', 'spvit-medium', 'spvit-large', 'deit-tiny', 'deit-small')
ARCHS += ('deit-base', 'deit-small-9h', 'large', 'huge', 'eva-g')


def infer_structure(state, img_size=None):
    """Read the structure off a state dict with the released names.

    Only some keys decide; :func:`check_state` compares them all.

    Returns:
        Tuple[dict, Optional[dict], int]: The arguments of its SPViT (the class token
        first, and ``num_heads`` None where no prior shows it), the config of its head,
        None where it has none, and how many entries of the position embedding belong
        to no patch.
    """

    def shape(key, ndim):
        value = state.get(key)
        if value is None or value.ndim != ndim or 0 in value.shape:
            got = 'nothing' if value is None else tuple(value.shape)
            raise CheckpointError(
                f'The model is told by `{key}`, of {ndim} dimensions, but it is {got}.'
            )
        return tuple(value.shape)

    width, channels, *patch = shape('patch_embed.proj.weight', 4)
    stem = 'patch'
    if 'patch_embed.conv1.weight' in state:
        stem_channels, channels, *_ = shape('patch_embed.conv1.weight', 4)
        stem = dict(type='ConvStem', stem_channels=stem_channels)
        patch = [2 * side for side in patch]
    length = shape('pos_embed', 3)[1]
    if img_size is None:
        img_size = _square(length, patch)
    num_patches = math.prod(n // side for n, side in zip(img_size, patch, strict=True))

    blocks = [names.split_block(key) for key in state]
    leaves = {name for name, _ in blocks}
    spsa = {i for name, i in blocks if '.attn.qk.' in name or name.endswith('.attn.w2')}
    num_heads, prior = None, None
    if spsa:
        (num_heads,) = shape('blocks.0.attn.b2', 1)
        units, _ = shape('blocks.0.attn.w2', 2)
        prior = dict(type='MLPSpatialPrior', hidden_dims=units // num_heads)
    has_aux_head, head = 'aux_head.weight' in state, None
    if any(key.startswith(('head.', 'aux_head.', 'pre_logits.')) for key in state):
        head = dict(
            type='TokenLabelClsHead' if has_aux_head else 'VisionTransformerClsHead',
            num_classes=shape('head.weight', 2)[0],
            in_channels=width,
        )
    if 'pre_logits.fc.weight' in state:
        head['hidden_dim'] = shape('pre_logits.fc.weight', 2)[0]
    backbone = dict(
        arch=dict(
            embed_dims=width,
            num_layers=len({i for _, i in blocks if i is not None}),
            num_heads=num_heads,
            feedforward_channels=shape('blocks.0.mlp.fc1.weight', 2)[0],
        ),
        img_size=tuple(img_size),
        patch_size=tuple(patch),
        in_channels=channels,
        num_spsa_layers=len(spsa),
        prior=prior,
        cls_token_layer=0,
        stem=stem,
        with_peg=any('.pos_block.' in name for name in leaves),
        qkv_bias='blocks.{i}.attn.qkv.bias' in leaves,
        layer_scale_init_value=1e-5 if 'blocks.{i}.ls1.gamma' in leaves else 0.0,
        pre_norm='norm_pre.weight' in state,
    )
    return backbone, head, int(length > num_patches)


def _square(length, patch):
    """The image size of a position embedding over a square grid."""
    for extra in (0, 1):
        side = math.isqrt(max(length - extra, 0))
        if side and side * side == length - extra:
            return [side * size for size in patch]
    raise CheckpointError(
        f'`pos_embed` has {length} entries, which make no square grid. Say the image '
        'size of the training with `--img-size H W`.'
    )


def find_arch(backbone):
    """The name of the published model with these layers; None if there is none."""
    for name in ARCHS:
        arch = SPViT.arch_zoo[name]
        same = [
            arch[key] == backbone['arch'][key]
            for key in ('embed_dims', 'num_layers', 'feedforward_channels')
        ]
        if all(same) and ('stem' in arch) == (backbone['stem'] != 'patch'):
            return name
    return None


def build(backbone, head, device='cpu'):
    """Build a model; on the meta device it has names and shapes alone."""
    try:
        with torch.device(device):
            parts = dict(backbone=SPViT(**backbone))
            if head is not None:
                parts['head'] = MODELS.build(dict(head, _scope_='mmpretrain'))
            return nn.ModuleDict(parts)
    except ValueError as error:
        raise CheckpointError(f'This makes no SP-ViT: {error}') from error


def check_state(state, backbone, head, pos_extra):
    """Raise, with all that differs, unless these are the weights of that structure."""
    # Without SP-SA no shape depends on the heads.
    arch = dict(backbone['arch'], num_heads=backbone['arch']['num_heads'] or 1)
    model = build(dict(backbone, arch=arch), head, 'meta')
    expected, _ = to_theirs(model.state_dict(), names.ALL)
    expected['pos_embed'] = expected['pos_embed'][:, 1 - pos_extra :]
    problems = {
        'find no place in SP-ViT': sorted(set(state) - set(expected)),
        'are missing': sorted(set(expected) - set(state)),
        'have an unexpected shape': [
            f'{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}'
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
        'are no floating-point numbers': [
            f'{key}: {state[key].dtype}'
            for key, value in expected.items()
            if key in state
            and value.is_floating_point()
            and not state[key].is_floating_point()
        ],
    }
    if not any(problems.values()):
        return
    message = 'The checkpoint cannot be converted; nothing was written.'
    for what, keys in problems.items():
        if keys:
            message += f'\n{len(keys)} keys {what}:\n  ' + '\n  '.join(keys)
    raise CheckpointError(message)
