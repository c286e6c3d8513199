"""The way back: a state dict of ours for the authors' code."""

import torch.nn.functional as F
from torch import nn

from ..models import MLPSpatialPrior, SpatialPriorAttention
from ..utils import CheckpointError
from . import names
from .state import to_theirs
from .structure import check_state, infer_structure
from .to_timm import ffn_act, input_apart, scores_apart


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


def check_released(model, state):
    """Raise a CheckpointError if a model computes what the released code does not.

    It is asked for what no weight shows, so it need not have its weights.

    Args:
        model (nn.Module): A classifier or segmentor with an SPViT as ``backbone``.
        state (dict): The weights that are converted, with our names.

    Returns:
        List[str]: What else no weight shows, for the notes.
    """
    backbone = model.backbone
    own = backbone.state_dict(prefix='backbone.')
    wrong = [
        key
        for key in sorted({*own, *(k for k in state if k.startswith('backbone.'))})
        if key not in own or key not in state or own[key].shape != state[key].shape
    ]
    if wrong:
        raise CheckpointError(
            'The config is not that of the checkpoint: they differ in '
            f'{", ".join(wrong[:5])}.'
        )
    differences = [
        f'layer {i}: {words}'
        for i, layer in enumerate(backbone.layers)
        for words in _differences(layer)
    ]
    if getattr(model, 'head', None) is not None:
        differences += input_apart(model, backbone)
    number, joins = backbone.num_spsa_layers, backbone.cls_token_layer
    if number and joins and joins != number:
        differences.append(
            f'the class token joins before layer {joins} (cls_token_layer), and not after '
            f'the {number} SP-SA layers'
        )
    if differences:
        raise CheckpointError(
            'The released code computes something else; nothing was written:\n  '
            + '\n  '.join(differences)
        )
    scale = 1 / backbone.layers[0].branch_scale
    return [
        f'Its skip scale is {scale:g} and its class token joins before layer {joins}: '
        'build the released model so.'
    ]


def _differences(layer):
    """In what a layer differs from those of the released code, in words."""
    if ffn_act(layer.ffn) != 'GELU':
        yield f'its FFN has {ffn_act(layer.ffn)}, not GELU'
    if layer.ln1.eps != 1e-5:
        yield f'the eps of its norms is {layer.ln1.eps:g}, not 1e-05'
    attn = layer.attn
    yield from scores_apart(attn)
    if type(attn) is not SpatialPriorAttention:
        return
    if attn.combine != 'multiply':
        yield f'its prior does not only multiply scores (combine={attn.combine!r})'
    prior = attn.prior
    if type(prior) is not MLPSpatialPrior:
        yield f'its prior is a {type(prior).__name__}'
    elif prior.coords != 'raw':
        yield f'its prior takes coords={prior.coords!r}, not raw ones'
    elif type(prior.act) is not nn.ReLU:
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
