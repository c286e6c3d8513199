"""Looking into attention without touching the fast path.

The kernels never hold the attention map, which is their point. Inside
:func:`record_attention` every attention of a model computes the same result the
plain way and keeps its map; outside nothing has changed.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, singledispatch
from typing import Optional

import torch
import torch.nn.functional as F
from mmpretrain.models.utils import MultiheadAttention
from torch import Tensor

from ..models import (
    GatedPositionalAttention,
    RelativePositionAttention,
    RotaryPositionAttention,
    SpatialPriorAttention,
)
from ..models.attention import GridAttention
from ..ops import expand_prior
from ..utils import UserError


@dataclass
class AttentionMap:
    """What one attention did in one forward.

    T tokens: the extra ones in front, then the patches in row-major order.

    Attributes:
        name (str): Name of the module in the model.
        content (Tensor): The scaled content scores, (B, heads, T, T); for 'rotary'
            those of the rotated queries and keys.
        position (Tensor, optional): What the position says of each pair, (1 or
            B, heads, T, T), in the sense of ``kind``.
        kind (str): 'prior' (multiplies the scores), 'bias' (adds to them), 'both'
            (``position`` multiplies, then ``bias`` adds: two priors, or one with a
            learned ``init_score``), 'gated' (a positional attention that is mixed
            in), 'rotary' or 'vanilla'.
        weights (Tensor): The attention, (B, heads, T, T), each row of sum 1,
            part of the graph where one is recorded.
        scores (Tensor, optional): Those before the softmax, where there is one
            softmax alone; minus infinity where a pair is masked.
        bias (Tensor, optional): What is added for 'both', (1, heads, T, T).
        keep (Tensor, optional): Which pairs are not masked, (1, heads, T, T), bool;
            None if none is.
    """

    name: str
    content: Tensor
    position: Optional[Tensor]
    kind: str
    weights: Tensor
    scores: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    keep: Optional[Tensor] = None


@dataclass
class Recording:
    """What :func:`record_attention` gives.

    Attributes:
        maps (List[AttentionMap]): One of each attention, in forward order.
        grid (Tuple[int, int], optional): The patches' grid (H, W) of the last
            forward.
    """

    maps: list[AttentionMap] = field(default_factory=list)
    grid: Optional[tuple[int, int]] = None


class evaluating:
    """Eval mode for the length of a ``with``; every module's own mode after it."""

    def __init__(self, model):
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self):
        self.model.eval()

    def __exit__(self, *_):
        for module, mode in self.modes:
            module.training = mode


@singledispatch
def attention_terms(module, q, content, hw, omega, rescale=None):
    """What an attention makes of its content scores.

    A new kind of :class:`~spvit_mm.models.attention.GridAttention` can be made
    known by ``attention_terms.register``.

    Args:
        module (GridAttention): The attention.
        q (Tensor): Queries (B, heads, T, d).
        content (Tensor): Scaled content scores (B, heads, T, T).
        hw (Tuple[int, int]): The grid (H, W).
        omega (Tensor | Tuple, optional): What a prior that was handed in evaluated to.
        rescale (Tensor, optional): (2,), factors of the coordinates. Only handed over
            where there are some, so an attention need not know of it.

    Returns:
        Tuple: ``position``, ``kind``, ``scores``, ``weights`` and, where there are any,
        ``bias`` and ``keep`` of :class:`AttentionMap`.
    """
    raise UserError(
        f'The attention {type(module).__name__} is not known to record_attention. '
        'Register it with spvit_mm.explain.attention_terms.register.'
    )


@attention_terms.register(SpatialPriorAttention)
def _(module, q, content, hw, omega, rescale=None):
    def pairs(table, neutral):
        if table is None:
            return None
        extra = module.num_extra_tokens
        table = F.pad(expand_prior(table, hw), (extra, 0, extra, 0), value=neutral)
        return table.expand(module.num_heads, -1, -1)[None]

    prior, bias, keep = module.score_tables(hw, q.device, omega, rescale)
    prior, bias, keep = pairs(prior, 1.0), pairs(bias, 0.0), pairs(keep, True)
    scores = content if prior is None else prior * content
    scores = scores if bias is None else scores + bias
    scores = scores if keep is None else scores.masked_fill(~keep, float('-inf'))
    weights = scores.softmax(dim=-1)
    if prior is None:
        kind = 'vanilla' if bias is None else 'bias'
        return bias, kind, scores, weights, None, keep
    kind = 'prior' if bias is None else 'both'
    return prior, kind, scores, weights, bias, keep


@attention_terms.register(RotaryPositionAttention)
def _(module, q, content, hw, omega, rescale=None):
    return None, 'rotary', content, content.softmax(dim=-1)


@attention_terms.register(RelativePositionAttention)
def _(module, q, content, hw, omega, rescale=None):
    bias = module.position_scores(q, hw, rescale)
    scores = content + bias
    return bias, 'bias', scores, scores.softmax(dim=-1)


@attention_terms.register(GatedPositionalAttention)
def _(module, q, content, hw, omega, rescale=None):
    table = module.position_scores(hw, rescale).to(content.dtype)
    extra = module.num_extra_tokens
    position = expand_prior(table, hw).softmax(dim=-1)
    position = F.pad(position, (extra, 0, extra, 0))[None]
    return position, 'gated', None, module.mix(content, hw, rescale)


def _recording_forward(module, name, maps, x, hw_shape, omega=None, rescale=None):
    """The forward of a GridAttention, with its map in memory."""
    q, k, v = module.project_qkv(x, hw_shape)
    if isinstance(module, RotaryPositionAttention):
        q, k = module.rotate(q, k, hw_shape, rescale)
    content = torch.matmul(q * module.scale, k.transpose(-2, -1))
    terms = (module, q, content, hw_shape, omega)
    if rescale is not None:
        terms += (rescale,)
    position, kind, scores, weights, *more = attention_terms(*terms)
    maps.append(AttentionMap(name, content, position, kind, weights, scores, *more))
    drop = module.attn_drop if module.training else 0.0
    # Priors are float32 at least, and so are scores and weights that they enter.
    weights = F.dropout(weights, drop).to(v.dtype)
    return module.merge_heads(torch.matmul(weights, v), v)


def _recording_kernel(name, maps, scale, q, k, v, dropout_p=0.0):
    """scaled_dot_product_attention, with its map in memory."""
    content = torch.matmul(q * scale, k.transpose(-2, -1))
    weights = content.softmax(dim=-1)
    maps.append(AttentionMap(name, content, None, 'vanilla', weights, content))
    return torch.matmul(F.dropout(weights, dropout_p), v)


def _vanilla_scale(module):
    """The factor that mmpretrain's MultiheadAttention takes, in either kernel."""
    kernel = module.scaled_dot_product_attention
    if isinstance(kernel, partial):  # its own kernel divides by `scale`
        return 1 / kernel.keywords['scale']
    return module.head_dims**-0.5


def find_attentions(model) -> dict:
    """The attentions of a model that can be recorded, by their names, in order.

    Raises:
        UserError: If there is none.
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiheadAttention)
    }
    if not attentions:
        raise UserError(
            f'{type(model).__name__} has no attention to record: no '
            'MultiheadAttention of mmpretrain, and none of spvit_mm.'
        )
    return attentions


@contextmanager
def record_attention(model):
    """Record the attention maps of every forward inside the ``with``.

    For a while each attention of the model, SP-SA or vanilla, is given a
    forward of its own that holds the whole map; it needs memory of
    B * heads * T^2 a layer and is not for compiled models. On leaving, also by
    an error, the model is as it was.

    Args:
        model (nn.Module): A classifier or a backbone: SPViT, mmpretrain's
            VisionTransformer, or another with ``MultiheadAttention``.

    Yields:
        Recording: Filled by each forward, and emptied before the next.

    Raises:
        UserError: If there is no attention in the model that can be recorded.

    Example:
        >>> with record_attention(model) as recording:
        ...     model(images)
        >>> recording.maps[0].weights.shape
    """
    recording = Recording()
    attentions = find_attentions(model)
    stem = next(
        (m for n, m in model.named_modules() if n.endswith('patch_embed')), None
    )

    def start(*_):
        recording.maps.clear()

    def keep_grid(module, inputs, output):
        if isinstance(output, tuple):
            recording.grid = tuple(int(side) for side in output[1])

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(start).remove)
        if stem is not None:
            stack.callback(stem.register_forward_hook(keep_grid).remove)
        for name, module in attentions.items():
            if isinstance(module, GridAttention):
                module.forward = partial(
                    _recording_forward, module, name, recording.maps
                )
                stack.callback(delattr, module, 'forward')
            else:
                kernel = module.scaled_dot_product_attention
                module.scaled_dot_product_attention = partial(
                    _recording_kernel, name, recording.maps, _vanilla_scale(module)
                )
                stack.callback(setattr, module, 'scaled_dot_product_attention', kernel)
        yield recording


def patch_grid(recording, model):
    """The grid (H, W) of the patches, or a UserError unless all layers have them."""
    tokens = [m.weights.shape[-1] for m in recording.maps]
    grid = recording.grid
    told = grid is not None and tokens == sorted(tokens)
    if not told or min(tokens, default=0) < grid[0] * grid[1]:
        raise UserError(
            f'{type(getattr(model, "backbone", model)).__name__} does not have one grid '
            'of patches, which `patch_embed` returns, in all layers: where its attention '
            'lies in the picture cannot be told.'
        )
    return grid


def layer_name(name):
    """A layer in words, from the name of a module in it."""
    parts = name.split('.')
    for i, part in enumerate(parts[:-1]):
        if part in ('layers', 'blocks') and parts[i + 1].isdigit():
            return f'layer {int(parts[i + 1]) + 1}'
    return name or 'attention'
