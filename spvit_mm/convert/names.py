"""The parameter names of the two worlds, side by side.

``{i}`` stands for the number of a block or layer. The projections of SP-SA are
in no table: there the source has ``qk`` and ``v`` where we have one ``qkv``.
"""

import re

_WB = ('weight', 'bias')
_BN = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def _pairs(theirs, ours, leaves=_WB):
    return {f'{theirs}.{leaf}': f'{ours}.{leaf}' for leaf in leaves}


TOKENS = {'cls_token': 'backbone.cls_token', 'pos_embed': 'backbone.pos_embed'}

PATCH_STEM = _pairs('patch_embed.proj', 'backbone.patch_embed.projection')

CONV_STEM = {}
for _n in (1, 2, 3):
    _ours = f'backbone.patch_embed.conv{_n}'
    CONV_STEM[f'patch_embed.conv{_n}.weight'] = f'{_ours}.conv.weight'
    CONV_STEM.update(_pairs(f'patch_embed.bn{_n}', f'{_ours}.bn', _BN))
CONV_STEM.update(PATCH_STEM)

LAYER = {
    **_pairs('blocks.{i}.norm1', 'backbone.layers.{i}.ln1'),
    **_pairs('blocks.{i}.attn.proj', 'backbone.layers.{i}.attn.proj'),
    **_pairs('blocks.{i}.norm2', 'backbone.layers.{i}.ln2'),
    **_pairs('blocks.{i}.mlp.fc1', 'backbone.layers.{i}.ffn.layers.0.0'),
    **_pairs('blocks.{i}.mlp.fc2', 'backbone.layers.{i}.ffn.layers.1'),
}
QKV = {'blocks.{i}.attn.qkv.weight': 'backbone.layers.{i}.attn.qkv.weight'}
QKV_BIAS = {'blocks.{i}.attn.qkv.bias': 'backbone.layers.{i}.attn.qkv.bias'}
PRIOR = {
    'blocks.{i}.attn.w1.weight': 'backbone.layers.{i}.attn.prior.w1',
    'blocks.{i}.attn.w1.bias': 'backbone.layers.{i}.attn.prior.b1',
    'blocks.{i}.attn.w2': 'backbone.layers.{i}.attn.prior.w2',
    'blocks.{i}.attn.b2': 'backbone.layers.{i}.attn.prior.b2',
}
PEG = _pairs('blocks.{i}.pos_block.proj.0', 'backbone.layers.{i}.peg.proj')
LAYER_SCALES = {
    'ls1.gamma': {  # timm
        'blocks.{i}.ls1.gamma': 'backbone.layers.{i}.attn.gamma1.weight',
        'blocks.{i}.ls2.gamma': 'backbone.layers.{i}.ffn.gamma2.weight',
    },
    'gamma_1': {  # DeiT III
        'blocks.{i}.gamma_1': 'backbone.layers.{i}.attn.gamma1.weight',
        'blocks.{i}.gamma_2': 'backbone.layers.{i}.ffn.gamma2.weight',
    },
}

NORM = _pairs('norm', 'backbone.ln1')
PRE_LOGITS = _pairs('pre_logits.fc', 'head.layers.pre_logits')
HEAD = _pairs('head', 'head.layers.head')
AUX_HEAD = _pairs('aux_head', 'head.aux_head')

# What a model of ours must be made of to have a counterpart in the released code.
RELEASED = {
    **TOKENS,
    **CONV_STEM,
    **LAYER,
    **QKV,
    **QKV_BIAS,
    **PRIOR,
    **PEG,
    **NORM,
    **HEAD,
    **AUX_HEAD,
}

_BLOCK = re.compile(r'(?<=^blocks\.)\d+(?=\.)')
_LAYER = re.compile(r'(?<=^backbone\.layers\.)\d+(?=\.)')


def split_block(key):
    """'blocks.3.norm1.bias' -> ('blocks.{i}.norm1.bias', 3); no block: None."""
    match = _BLOCK.search(key) or _LAYER.search(key)
    if match is None:
        return key, None
    return f'{key[: match.start()]}{{i}}{key[match.end() :]}', int(match.group())


def numbered(table, i):
    """A table with ``{i}`` filled in."""
    return {
        k.replace('{i}', str(i)): v.replace('{i}', str(i)) for k, v in table.items()
    }
