"""The way back: a state dict of ours for the authors' code."""

import torch.nn.functional as F
from torch import nn

from ..models import MLPSpatialPrior, SpatialPriorAttention
from ..utils import CheckpointError
from . import names
from .state import to_theirs
from .structure import check_state, infer_structure
from .to_timm import ffn_act


def to_released(state):
    """Rename and split: our names -> the released ones.

    Returns:
        Tuple[Dict[str, Tensor], List[str]]: The state dict, and what is worth saying.

    Raises:
        CheckpointError: If any weight has no counterpart there.
    """
    if not any(key.startswith('backbone.layers.') for key in state):
        raise CheckpointError(
            'To the released names only an OpenMMLab checkpoint of ours is converted, '
            'whose keys start with `backbone.layers.`; this has '
            f'{", ".join(list(state)[:5])}, ...'
        )
    grid = state.pop('backbone.train_grid', None)
    out, unplaced = to_theirs(state, names.RELEASED)
    if unplaced:
        raise CheckpointError(
            'The released code knows no such weights; nothing was written. '
            f'{len(unplaced)} keys find no place:\n  '
            + '\n  '.join(unplaced)
            + '\n(It has priors of one hidden layer in every SP-SA block, the convolution '
            'stem, and no bias on q, k, v.)'
        )
    rows, columns = (0, 0) if grid is None else grid.tolist()
    _require(rows == columns, f'square grids, not one of {rows} x {columns} patches')
    stem = 'patch_embed.conv1.weight' in out
    _require(stem, 'the convolution stem alone, not one of one layer (as DeiT)')
    half = out['patch_embed.proj.weight'].shape[2:]
    img_size = [2 * side * rows for side in half] if rows else None
    backbone, head, pos_extra = infer_structure(out, img_size)
    check_state(out, backbone, head, pos_extra)

    number, notes = backbone['num_spsa_layers'], []
    if number:
        _require(backbone['with_peg'], 'a PEG in all its SP-SA blocks (with_peg)')
        notes += _widen_priors(out, backbone)
    if head is None:
        notes.append(
            'There is no head: in the released code build it with num_classes=0.'
        )
    elif head['type'] != 'TokenLabelClsHead':
        notes.append(
            'There is no auxiliary head: in the released code build the model with '
            'return_dense=False and mix_token=False.'
        )
    if pos_extra and number:
        notes.append(
            'WARNING: here the class token comes first (cls_token_layer=0); the released '
            'code lets it join after the SP-SA layers and does not load the class '
            "token's entry of pos_embed unless it is changed."
        )
    elif not pos_extra:
        layer = number or 'the cls_token_layer of this model'
        notes.append(
            f'In the released code set local_up_to_layer to {layer}: the class token '
            'joins there, so a cls_token_layer other than the number of SP-SA layers '
            'would compute something else.'
        )
    return out, notes


def check_released(backbone):
    """Raise a CheckpointError if an SPViT computes what the released code cannot.

    It finds what no weight shows: two models of the same weights may differ in it.

    Args:
        backbone (SPViT): The backbone, or a classifier or segmentor with one.
    """
    backbone = getattr(backbone, 'backbone', backbone)
    differences = [
        f'layer {i}: {words}'
        for i, layer in enumerate(backbone.layers)
        for words in _differences(layer)
    ]
    if differences:
        raise CheckpointError(
            'The released code computes something else; nothing was written:\n  '
            + '\n  '.join(differences)
        )


def _differences(layer):
    """In what a layer differs from those of the released code, in words."""
    if ffn_act(layer.ffn) != 'GELU':
        yield f'its FFN has {ffn_act(layer.ffn)}, not GELU'
    attn = layer.attn
    scale = getattr(attn, 'scale', attn.head_dims**-0.5)
    if scale != attn.head_dims**-0.5:
        yield f'it scales its scores by {scale:g} (qk_scale)'
    if not isinstance(attn, SpatialPriorAttention):
        return
    if attn.combine != 'multiply':
        yield f'its prior does not only multiply scores (combine={attn.combine!r})'
    prior = attn.prior
    if isinstance(prior, MLPSpatialPrior):
        if prior.coords != 'raw':
            yield f'its prior takes coords={prior.coords!r}, not raw ones'
        if type(prior.act) is not nn.ReLU:
            yield f'its prior has {type(prior.act).__name__}, not ReLU'


def _require(fits, what):
    if not fits:
        raise CheckpointError(f'The released code has {what}; nothing was written.')


def _widen_priors(state, backbone):
    """The released hidden width is that of a head: fill up with zero units."""
    heads, hidden = backbone['arch']['num_heads'], backbone['prior']['hidden_dims']
    width = backbone['arch']['embed_dims'] // heads
    _require(heads > 1, 'a prior for each head, not one that all share')
    _require(
        hidden <= width,
        f'priors of the hidden width of a head, {width}, and cannot hold {hidden} units',
    )
    if hidden == width:
        return []
    for i in range(backbone['num_spsa_layers']):
        for name in ('w1.weight', 'w1.bias', 'w2'):
            key = f'blocks.{i}.attn.{name}'
            value = state[key].reshape(heads, hidden, -1)
            value = F.pad(value, (0, 0, 0, width - hidden))
            state[key] = value.reshape(heads * width, *state[key].shape[1:])
    return [
        f'The priors were widened from {hidden} to {width} hidden units, as the released '
        'code has them, with units of weight 0: the function is the same.'
    ]
