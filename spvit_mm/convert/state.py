"""State dicts: picking them out of a file, renaming, fusing and splitting."""

from collections import OrderedDict

import torch
import torch.nn.functional as F

from ..models import MLPSpatialPrior
from ..utils import CheckpointError
from . import names
from .structure import infer_structure

WEIGHTS = ('auto', 'ema', 'plain')
PLAIN_KEYS = ('state_dict', 'model')
EMA_KEYS = ('state_dict_ema', 'model_ema')


# ------------------------------------------------------------------- picking


def pick_state_dict(content, weights='auto'):
    """Take the weights out of what a file holds.

    Args:
        content (object): What :func:`~spvit_mm.utils.read_checkpoint` returned.
        weights (str): 'ema', 'plain', or 'auto': EMA where there is one.
            mmengine's EMAHook stores the EMA as ``state_dict`` and the plain
            weights as ``ema_state_dict``. Defaults to 'auto'.

    Returns:
        Tuple[Dict[str, Tensor], str]: The weights without any ``module.`` in
        front of their names, and the entry that they were in.

    Raises:
        CheckpointError: If there are none of that kind, or the entry holds
            anything but tensors.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(f'`weights` must be one of {WEIGHTS}, got {weights!r}.')
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f'The file holds {_describe(content)} and no dict of weights.'
        )
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        if weights == 'ema':
            raise CheckpointError(
                'The file is a bare state dict without EMA weights. Take '
                '`--weights plain`.'
            )
        return _clean(content, 'the file itself'), 'the file itself'

    plain = next((key for key in PLAIN_KEYS if content.get(key)), None)
    ema = next((key for key in EMA_KEYS if content.get(key)), None)
    if content.get('ema_state_dict'):
        plain, ema = 'ema_state_dict', plain
    key = {'plain': plain, 'ema': ema, 'auto': ema or plain}[weights]
    if key is None:
        raise CheckpointError(
            f'The file has no {"" if weights == "auto" else weights + " "}weights: its '
            f'entries are {list(content)}, looked for were '
            f'{PLAIN_KEYS + EMA_KEYS}.'
        )
    return _clean(content[key], key), key


def _clean(state, entry):
    if not isinstance(state, dict):
        raise CheckpointError(f'`{entry}` holds {_describe(state)} and no dict.')
    # AveragedModel counts its steps beside the weights.
    state = {
        key: v
        for key, v in state.items()
        if (entry, key) != ('ema_state_dict', 'steps')
    }
    clean = OrderedDict()
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f'`{entry}` must hold tensors alone, but {key!r} is {_describe(value)}.'
            )
        name = key[len('module.') :] if key.startswith('module.') else key
        if name in clean:
            raise CheckpointError(
                f'`{entry}` holds {name!r} with and without `module.`.'
            )
        clean[name] = value.detach()
    return clean


def _describe(value):
    text = f'a {type(value).__name__}'
    if isinstance(value, torch.Tensor):
        text += f' of shape {tuple(value.shape)}'
    return text


def drop_distillation(state):
    """Leave out the second token of a distilled DeiT and its head.

    Returns:
        Tuple[Dict[str, Tensor], List[str]]: The rest, and what was left out.
    """
    state = OrderedDict(state)
    dropped = ['dist_token', 'head_dist.weight', 'head_dist.bias']
    dropped = [key for key in dropped if state.pop(key, None) is not None]
    position = state.get('pos_embed')
    if position is not None and position.ndim == 3 and position.shape[1] > 2:
        state['pos_embed'] = torch.cat((position[:, :1], position[:, 2:]), 1)
        dropped.append('pos_embed[:, 1]')
    return state, dropped


# ---------------------------------------------------------------- our names


def to_ours(state, structure):
    """Rename and fuse: the released names -> ours.

    Nothing is left out: the keys must be exactly those of the structure.

    Raises:
        CheckpointError: With every key that is missing, has no place or
            another shape.
    """
    structure.check(state)
    table = structure.plain_names()
    fused = {}
    for (qk, v), ours in structure.split_names().items():
        fused[qk] = ours, torch.cat((state[qk], state[v]))
        fused[v] = None, None
    out = OrderedDict()
    for key, value in state.items():
        name, value = fused.get(key, (table.get(key), value))
        if name is not None:
            out[name] = value.clone()
    out['backbone.train_grid'] = torch.tensor(structure.grid)
    return out


def place_cls_position(state, pos_extra, cls_token_layer):
    """Fit the class token's position entry to where the token joins.

    In a late model the entry is added to the token itself; in an early one
    that lacks it, it is 0.

    Returns:
        str | None: What was done, in words.
    """
    name, cls_name = 'backbone.pos_embed', 'backbone.cls_token'
    position = state[name]
    if pos_extra and cls_token_layer > 0:
        state[cls_name] = state[cls_name] + position[:, :1]
        state[name] = position[:, 1:].clone()
        return (
            f'The class token joins before layer {cls_token_layer} and has no position '
            'there: its entry of pos_embed was added to cls_token. Outputs differ from '
            "the source's until trained; with the class token first they are equal."
        )
    if not pos_extra and cls_token_layer == 0:
        state[name] = torch.cat((torch.zeros_like(position[:, :1]), position), 1)
        return 'The class token comes first and had no position entry: it is 0.'
    return None


def add_neutral_priors(state, num_spsa_layers, num_heads, hidden_dims):
    """Write the neutral prior (1 everywhere) of every SP-SA layer to be."""
    with torch.random.fork_rng(devices=[]):
        # The same file each time: the first layer starts at random.
        torch.manual_seed(0)
        for i in range(num_spsa_layers):
            prior = MLPSpatialPrior(num_heads, hidden_dims)
            for name, value in prior.state_dict().items():
                state[f'backbone.layers.{i}.attn.prior.{name}'] = value


def as_float32(state):
    """Cast half-precision weights, in place; returns the names of the dtypes."""
    odd = set()
    for key, value in state.items():
        if value.is_floating_point() and value.dtype != torch.float32:
            odd.add(str(value.dtype))
            state[key] = value.float()
    return sorted(odd)


# ---------------------------------------------------------- the released names


def to_released(state):
    """Rename and split: our names -> the released ones, for the authors' code.

    Args:
        state (Dict[str, Tensor]): A state dict of a classifier of ours.

    Returns:
        Tuple[Dict[str, Tensor], Structure, List[str]]: The state dict, its
        structure, and what is worth saying.

    Raises:
        CheckpointError: If any weight has no counterpart there.
    """
    if not any(key.startswith('backbone.layers.') for key in state):
        raise CheckpointError(
            'To the released names only an OpenMMLab checkpoint of ours is converted, '
            'whose keys start with `backbone.layers.`; this has '
            + ', '.join(list(state)[:5])
            + ', ...'
        )
    notes = []
    theirs = {ours: name for name, ours in names.RELEASED.items()}
    state = OrderedDict(state)
    grid = state.pop('backbone.train_grid', None)
    # The same in a prior that scales its coordinates, which has no counterpart.
    spsa = {
        i
        for name, i in map(names.split_block, state)
        if i is not None and '.prior.' in name
    }
    out, unplaced = OrderedDict(), []
    for key, value in state.items():
        name, i = names.split_block(key)
        if i in spsa and name == names.QKV['blocks.{i}.attn.qkv.weight']:
            rows = 2 * value.shape[0] // 3
            out[f'blocks.{i}.attn.qk.weight'] = value[:rows].clone()
            out[f'blocks.{i}.attn.v.weight'] = value[rows:].clone()
        elif name not in theirs or (i in spsa and name.endswith('qkv.bias')):
            unplaced.append(key)
        else:
            out[theirs[name].replace('{i}', str(i))] = value.clone()
    if unplaced:
        raise CheckpointError(
            'The released code knows no such weights; nothing was written. '
            f'{len(unplaced)} keys find no place:\n  '
            + '\n  '.join(unplaced)
            + '\n(It has priors of one hidden layer in every SP-SA block, the convolution '
            'stem, and no bias on q, k, v.)'
        )
    if 'patch_embed.conv1.weight' not in out:
        raise CheckpointError(
            'The released code has the convolution stem alone; this model has a stem of '
            'one layer (as DeiT).'
        )
    img_size = None
    if grid is not None:
        rows, columns = grid.tolist()
        if rows != columns:
            raise CheckpointError(
                'The released code takes square grids only; this model was trained on '
                f'{rows} x {columns} patches.'
            )
        half = out['patch_embed.proj.weight'].shape[2:]
        img_size = rows * 2 * half[0], columns * 2 * half[1]
    structure = infer_structure(out, img_size)
    structure.check(out)
    if structure.num_spsa_layers:
        notes += _widen_priors(out, structure)
    if structure.num_spsa_layers and not structure.with_peg:
        raise CheckpointError(
            'The released SP-SA blocks all have a PEG; this model has none (with_peg).'
        )
    if not structure.with_aux_head:
        notes.append(
            'There is no auxiliary head: in the released code build the model with '
            'return_dense=False and mix_token=False.'
        )
    return out, structure, notes


def _widen_priors(state, structure):
    """The released hidden width is that of a head: fill up with zero units."""
    heads, hidden = structure.num_heads, structure.hidden_dims
    width = structure.embed_dims // heads
    if hidden > width:
        raise CheckpointError(
            f'The priors have a hidden width of {hidden}; in the released code it is that '
            f'of a head, {width}, and cannot hold them.'
        )
    if hidden == width:
        return []
    for i in range(structure.num_spsa_layers):
        for name in ('w1.weight', 'w1.bias', 'w2'):
            key = f'blocks.{i}.attn.{name}'
            value = state[key].reshape(heads, hidden, -1)
            value = F.pad(value, (0, 0, 0, width - hidden))
            state[key] = value.reshape(heads * width, *state[key].shape[1:])
    structure.hidden_dims = width
    return [
        f'The priors were widened from {hidden} to {width} hidden units, as the released '
        'code has them, with units of weight 0: the function is the same.'
    ]
