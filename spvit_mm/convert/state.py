"""State dicts: picking them out of a file, renaming, fusing and splitting."""

from collections import OrderedDict

import torch

from ..utils import CheckpointError
from . import names

# A bare state dict is put under the first.
PLAIN_KEYS = ('the file itself', 'state_dict', 'model')
EMA_KEYS = ('state_dict_ema', 'model_ema')


def pick_state_dict(content, weights='auto'):
    """Take the weights out of what a file holds.

    'auto' takes the EMA where there is one. mmengine's EMAHook stores the EMA as
    ``state_dict`` and the plain weights as ``ema_state_dict``.

    Returns:
        Tuple[Dict[str, Tensor], str]: The weights without any ``module.`` in
        front of their names, and the entry that they were in.
    """
    entries = content if isinstance(content, dict) else {}
    if entries and all(isinstance(value, torch.Tensor) for value in entries.values()):
        entries = {PLAIN_KEYS[0]: content}
    plain = next((key for key in PLAIN_KEYS if entries.get(key) is not None), None)
    ema = next((key for key in EMA_KEYS if entries.get(key) is not None), None)
    if 'ema_state_dict' in entries:
        plain, ema = 'ema_state_dict', plain
    entry = {'plain': plain, 'ema': ema, 'auto': ema or plain}[weights]
    state = entries.get(entry)
    if not isinstance(state, dict):
        kind = '' if weights == 'auto' else f'{weights} '
        raise CheckpointError(
            f'The file has no {kind}weights. It is a {type(content).__name__} of '
            f'{list(entries)}; looked for was a dict of tensors, or one under '
            f'{PLAIN_KEYS[1:] + EMA_KEYS}.'
        )
    clean = OrderedDict()
    for key, value in state.items():
        if (entry, key) == ('ema_state_dict', 'steps'):
            continue  # AveragedModel counts its steps beside the weights.
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f'`{entry}` must hold tensors alone, but {key!r} is a '
                f'{type(value).__name__}.'
            )
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                f'{key!r} of `{entry}` is sparse or quantized. Save it as '
                'tensor.to_dense() or tensor.dequantize().'
            )
        clean[key.removeprefix('module.')] = value.detach()
    return clean, entry


def to_ours(state, table):
    """Rename and fuse: the released names -> ours. Each must have its place."""
    out = OrderedDict()
    for key, value in state.items():
        if key.endswith('.attn.v.weight'):
            continue
        if key.endswith('.attn.qk.weight'):
            value = torch.cat((value, state[key.replace('.qk.', '.v.')]))
            key = key.replace('.qk.', '.qkv.')
        out[names.rename(key, table)] = value.clone()
    return out


def to_theirs(state, table):
    """Rename and split: our names, on any device -> the released ones.

    Returns:
        Tuple[Dict[str, Tensor], List[str]]: The state dict, and the keys that have
        no name there.
    """
    ours = {name: theirs for theirs, name in table.items()}
    spsa = {names.split_block(key)[1] for key in state if '.attn.prior.' in key}
    out, unplaced = OrderedDict(), []
    for key, value in state.items():
        name = names.rename(key, ours)
        if '.attn.qkv.' in key and names.split_block(key)[1] in spsa:
            if key.endswith('.weight'):
                rows = 2 * value.shape[0] // 3
                out[name.replace('.qkv.', '.qk.')] = value[:rows].clone()
                out[name.replace('.qkv.', '.v.')] = value[rows:].clone()
                continue
            name = None
        if name is None:
            unplaced.append(key)
        else:
            out[name] = value.clone()
    return out, unplaced
