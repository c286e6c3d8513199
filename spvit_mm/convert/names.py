"""The names of the two worlds, side by side.

``{i}`` stands for the number of a block or layer. A name is that of a module, whose
parameters are called alike in both worlds, or of one parameter. The projections of
SP-SA are in no table: there the source has ``qk`` and ``v`` where we have one ``qkv``.
"""

import re

CONV_STEM = {}
for _n in (1, 2, 3):
    _ours = f'backbone.patch_embed.conv{_n}'
    CONV_STEM[f'patch_embed.conv{_n}'] = f'{_ours}.conv'
    CONV_STEM[f'patch_embed.bn{_n}'] = f'{_ours}.bn'

# What both the released code and we have.
RELEASED = {
    'cls_token': 'backbone.cls_token',
    'pos_embed': 'backbone.pos_embed',
    **CONV_STEM,
    'patch_embed.proj': 'backbone.patch_embed.projection',
    'blocks.{i}.norm1': 'backbone.layers.{i}.ln1',
    'blocks.{i}.attn.qkv': 'backbone.layers.{i}.attn.qkv',
    'blocks.{i}.attn.w1.weight': 'backbone.layers.{i}.attn.prior.w1',
    'blocks.{i}.attn.w1.bias': 'backbone.layers.{i}.attn.prior.b1',
    'blocks.{i}.attn.w2': 'backbone.layers.{i}.attn.prior.w2',
    'blocks.{i}.attn.b2': 'backbone.layers.{i}.attn.prior.b2',
    'blocks.{i}.attn.proj': 'backbone.layers.{i}.attn.proj',
    'blocks.{i}.norm2': 'backbone.layers.{i}.ln2',
    'blocks.{i}.mlp.fc1': 'backbone.layers.{i}.ffn.layers.0.0',
    'blocks.{i}.mlp.fc2': 'backbone.layers.{i}.ffn.layers.1',
    'blocks.{i}.pos_block.proj.0': 'backbone.layers.{i}.peg.proj',
    'norm': 'backbone.ln1',
    'head': 'head.layers.head',
    'aux_head': 'head.aux_head',
}
# timm's ViT has more. (DeiT III calls its layer scales gamma_1 and gamma_2.)
ALL = {
    **RELEASED,
    'blocks.{i}.ls1.gamma': 'backbone.layers.{i}.attn.gamma1.weight',
    'blocks.{i}.ls2.gamma': 'backbone.layers.{i}.ffn.gamma2.weight',
    'norm_pre': 'backbone.pre_norm',
    'pre_logits.fc': 'head.layers.pre_logits',
}

_NUMBER = re.compile(r'(?:(?<=^blocks\.)|(?<=^backbone\.layers\.))\d+(?=\.)')


def split_block(key):
    """'blocks.3.norm1.bias' -> ('blocks.{i}.norm1.bias', 3); no block: None."""
    match = _NUMBER.search(key)
    if match is None:
        return key, None
    return f'{key[: match.start()]}{{i}}{key[match.end() :]}', int(match.group())


def rename(key, table):
    """The name of a parameter in the other world; None if it has none there."""
    name, i = split_block(key)
    module, _, leaf = name.rpartition('.')
    if name in table:
        name = table[name]
    elif module in table:
        name = f'{table[module]}.{leaf}'
    else:
        return None
    return name.replace('{i}', str(i))
