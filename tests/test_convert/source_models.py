"""The source models, written plainly from their description, in float64.

Each is a function of a state dict with the released keys: no module, no
sharing of values, the prior's MLP on every pair of patches. Nothing of
``spvit_mm`` is used, so that the converter has an independent opponent.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F


@dataclass
class Spec:
    """A source model: what its weights are made for."""

    width: int
    depth: int
    heads: int
    ratio: float = 4
    num_spsa: int = 0
    hidden: int = 0
    cls_layer: int = 0
    stem: Optional[int] = None
    peg: bool = False
    skip: float = 1.0
    eps: float = 1e-6
    qkv_bias: bool = True
    aux: bool = False
    patch: int = 16
    grid: tuple = (14, 14)
    classes: int = 1000
    distilled: bool = False
    layer_scale: Optional[tuple] = None
    pre_norm: bool = False
    quick_gelu: bool = False
    head: bool = True

    @property
    def img_size(self):
        return self.grid[0] * self.patch, self.grid[1] * self.patch


def spvit(width, depth, heads, num_spsa, stem=64, skip=2.0, hidden=None, **kwargs):
    cls_layer = kwargs.pop('cls_layer', num_spsa)
    hidden = hidden or width // heads
    common = dict(ratio=3, stem=stem, peg=True, skip=skip, eps=1e-5, qkv_bias=False)
    common.update(aux=True, num_spsa=num_spsa, hidden=hidden, cls_layer=cls_layer)
    return Spec(width, depth, heads, **{**common, **kwargs})


def lvvit(width, depth, heads, **kwargs):
    return spvit(width, depth, heads, 0, **{'peg': False, 'hidden': 1, **kwargs})


RELEASED = {
    'SP-ViT-S': spvit(384, 16, 6, 14),
    'SP-ViT-M': spvit(512, 20, 8, 18),
    'SP-ViT-L (22 SP-SA)': spvit(768, 24, 12, 22, stem=128, skip=3.0),
    'SP-ViT-L (as released)': spvit(768, 24, 12, 0, stem=128, skip=3.0, cls_layer=22),
    'LV-ViT-S': lvvit(384, 16, 6),
    'LV-ViT-M': lvvit(512, 20, 8),
    'LV-ViT-L': lvvit(768, 24, 12, stem=128, skip=3.0),
    'DeiT-T': Spec(192, 12, 3),
    'DeiT-S': Spec(384, 12, 6),
    'DeiT-B': Spec(768, 12, 12),
    'ViT-L/16 of timm': Spec(1024, 24, 16),
}


def make_state(spec, seed=0):
    """Random weights with the released keys, none of them trivial, in float64.

    Matrices keep the size of what flows through them; priors, norms and batch
    statistics are well away from their start.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0, mean=0.0):
        value = torch.randn(*shape, generator=gen, dtype=torch.float64) * std + mean
        # Values of float32, as in a real file: converting must not round.
        return value.float().double()

    state = {}
    width, patch, tokens = spec.width, spec.patch, spec.grid[0] * spec.grid[1]

    def linear(name, rows, columns, bias=True):
        state[f'{name}.weight'] = normal(rows, columns, std=columns**-0.5)
        if bias:
            state[f'{name}.bias'] = normal(rows, std=0.1)

    def norm(name, size):
        state[f'{name}.weight'] = normal(size, std=0.2, mean=1.0)
        state[f'{name}.bias'] = normal(size, std=0.2)

    extra = (spec.cls_layer == 0) + spec.distilled
    state['cls_token'] = normal(1, 1, width, std=0.5)
    if spec.distilled:
        state['dist_token'] = normal(1, 1, width, std=0.5)
    state['pos_embed'] = normal(1, extra + tokens, width, std=0.5)
    if spec.stem is None:
        fan = 3 * patch**2
        state['patch_embed.proj.weight'] = normal(width, 3, patch, patch, std=fan**-0.5)
    else:
        stem, half = spec.stem, patch // 2
        for n, (channels, size) in enumerate(((3, 7), (stem, 3), (stem, 3)), 1):
            std = (channels * size**2) ** -0.5
            state[f'patch_embed.conv{n}.weight'] = normal(
                stem, channels, size, size, std=std
            )
            norm(f'patch_embed.bn{n}', stem)
            state[f'patch_embed.bn{n}.running_mean'] = normal(stem, std=0.3)
            variance = normal(stem).abs() + 0.5
            state[f'patch_embed.bn{n}.running_var'] = variance.float().double()
            state[f'patch_embed.bn{n}.num_batches_tracked'] = torch.tensor(1000 + n)
        std = (stem * half**2) ** -0.5
        state['patch_embed.proj.weight'] = normal(width, stem, half, half, std=std)
    if spec.pre_norm:
        norm('norm_pre', width)
    else:
        state['patch_embed.proj.bias'] = normal(width, std=0.1)

    for i in range(spec.depth):
        block = f'blocks.{i}'
        norm(f'{block}.norm1', width)
        if i < spec.num_spsa:
            units = spec.heads * spec.hidden
            linear(f'{block}.attn.qk', 2 * width, width, bias=False)
            linear(f'{block}.attn.v', width, width, bias=False)
            state[f'{block}.attn.w1.weight'] = normal(units, 2, std=0.3)
            state[f'{block}.attn.w1.bias'] = normal(units, std=0.5)
            state[f'{block}.attn.w2'] = normal(units, 1, std=spec.hidden**-0.5)
            state[f'{block}.attn.b2'] = normal(spec.heads, std=0.3, mean=1.0)
        else:
            linear(f'{block}.attn.qkv', 3 * width, width, bias=spec.qkv_bias)
        linear(f'{block}.attn.proj', width, width)
        norm(f'{block}.norm2', width)
        linear(f'{block}.mlp.fc1', int(width * spec.ratio), width)
        linear(f'{block}.mlp.fc2', width, int(width * spec.ratio))
        if spec.layer_scale:
            for name in spec.layer_scale:
                state[f'{block}.{name}'] = normal(width, std=0.1, mean=0.5)
        if spec.peg:
            state[f'{block}.pos_block.proj.0.weight'] = normal(width, 1, 3, 3, std=0.2)
            state[f'{block}.pos_block.proj.0.bias'] = normal(width, std=0.1)
    norm('norm', width)
    if spec.head:
        linear('head', spec.classes, width)
    if spec.distilled:
        linear('head_dist', spec.classes, width)
    if spec.aux:
        linear('aux_head', spec.classes, width)
    return state


def as_saved(state):
    """The state in float32, as a file holds it."""
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def forward(spec, state, images):
    """Images (B, 3, h, w) in float64 -> all tokens (B, 1 + N, C) after the norm."""
    grid = _stem(spec, state, images)
    batch, width, rows, columns = grid.shape
    x = grid.flatten(2).transpose(1, 2)
    cls = state['cls_token'].expand(batch, 1, width)
    if spec.cls_layer == 0:
        x = torch.cat((cls, x), 1)
    x = x + state['pos_embed']
    if spec.pre_norm:
        x = _norm(spec, state, 'norm_pre', x)
    for i in range(spec.depth):
        if 0 < spec.cls_layer == i:
            x = torch.cat((cls, x), 1)
        block = {
            key[len(f'blocks.{i}.') :]: value
            for key, value in state.items()
            if key.startswith(f'blocks.{i}.')
        }
        scale1, scale2 = (
            (block[s] for s in spec.layer_scale) if spec.layer_scale else (1, 1)
        )
        y = _norm(spec, block, 'norm1', x)
        x = x + scale1 * _attention(spec, block, y, rows, columns) / spec.skip
        y = _norm(spec, block, 'norm2', x)
        y = _linear(block, 'mlp.fc1', y)
        y = y * torch.sigmoid(1.702 * y) if spec.quick_gelu else F.gelu(y)
        x = x + scale2 * _linear(block, 'mlp.fc2', y) / spec.skip
        if spec.peg:
            x = _peg(block, x, rows, columns)
    return _norm(spec, state, 'norm', x)


def classify(spec, state, images):
    """Logits (B, classes), with half of the auxiliary head's maximum if there."""
    x = forward(spec, state, images)
    logits = _linear(state, 'head', x[:, 0])
    if spec.aux:
        logits = logits + 0.5 * _linear(state, 'aux_head', x[:, 1:]).amax(1)
    return logits


def _linear(state, name, x):
    return F.linear(x, state[f'{name}.weight'], state.get(f'{name}.bias'))


def _norm(spec, state, name, x):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    x = (x - mean) / torch.sqrt(var + spec.eps)
    return x * state[f'{name}.weight'] + state[f'{name}.bias']


def _stem(spec, state, x):
    if spec.stem is not None:
        for n, (stride, pad) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
            x = F.conv2d(
                x, state[f'patch_embed.conv{n}.weight'], stride=stride, padding=pad
            )
            bn = {
                k: state[f'patch_embed.bn{n}.{k}'].view(1, -1, 1, 1)
                for k in ('weight', 'bias', 'running_mean', 'running_var')
            }
            x = (x - bn['running_mean']) / torch.sqrt(bn['running_var'] + 1e-5)
            x = torch.relu(x * bn['weight'] + bn['bias'])
    weight = state['patch_embed.proj.weight']
    bias = state.get('patch_embed.proj.bias')
    return F.conv2d(x, weight, bias, stride=weight.shape[2:])


def _attention(spec, block, x, rows, columns):
    batch, length, width = x.shape
    if 'attn.qk.weight' in block:
        q, k = _linear(block, 'attn.qk', x).split(width, -1)
        v = _linear(block, 'attn.v', x)
    else:
        q, k, v = _linear(block, 'attn.qkv', x).split(width, -1)
    dim = width // spec.heads
    out = []
    for h in range(spec.heads):
        part = slice(h * dim, (h + 1) * dim)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim)
        if 'attn.w1.weight' in block:
            extra = length - rows * columns
            omega = torch.ones(length, length, dtype=x.dtype)
            omega[extra:, extra:] = _omega(spec, block, h, rows, columns)
            scores = omega * scores
        out.append(scores.softmax(-1) @ v[..., part])
    return _linear(block, 'attn.proj', torch.cat(out, -1))


def _omega(spec, block, h, rows, columns):
    """The prior of one head on all N x N pairs, query first."""
    own = slice(h * spec.hidden, (h + 1) * spec.hidden)
    w1, b1 = block['attn.w1.weight'][own], block['attn.w1.bias'][own]
    w2, b2 = block['attn.w2'][own, 0], block['attn.b2'][h]
    place = torch.tensor(
        [(x, y) for y in range(rows) for x in range(columns)], dtype=w1.dtype
    )
    pairs = place[None, :] - place[:, None]  # [query, key] = key - query, (x, y)
    return torch.relu(pairs @ w1.T + b1) @ w2 + b2


def _peg(block, x, rows, columns):
    extra = x.shape[1] - rows * columns
    grid = x[:, extra:].transpose(1, 2).unflatten(2, (rows, columns))
    weight, bias = block['pos_block.proj.0.weight'], block['pos_block.proj.0.bias']
    grid = grid + F.conv2d(grid, weight, bias, padding=1, groups=grid.shape[1])
    return torch.cat((x[:, :extra], grid.flatten(2).transpose(1, 2)), 1)
