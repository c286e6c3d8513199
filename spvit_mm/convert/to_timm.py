"""A model whose priors change nothing, under the names of timm's VisionTransformer."""

from mmcv.cnn.bricks.transformer import FFN, PatchEmbed
from mmpretrain.models.heads import LinearClsHead, VisionTransformerClsHead
from mmpretrain.models.utils import MultiheadAttention
from torch import nn

from ..models import SpatialPrior, SpatialPriorAttention, SPViT
from ..models.attention import evaluate_priors
from ..models.priors import ConstantSpatialPrior
from ..utils import CheckpointError
from . import names
from .state import to_theirs

# What timm calls them.
ACTS = {'GELU': 'gelu', 'QuickGELU': 'quick_gelu'}
# The name of the last layer, and of what timm's head has not.
HEADS = {
    VisionTransformerClsHead: ('layers.head', ('layers.pre_logits',)),
    LinearClsHead: ('fc', ()),
}


def to_timm(model):
    """Rename a model's weights to those of timm's VisionTransformer.

    Whether it computes what that one does is asked of the model, since most of it no
    weight shows. A prior may be there if its values change nothing on the grid of the
    training, such as one that has not been trained, or was folded to ones.

    Args:
        model (nn.Module): An SPViT, or a classifier or segmentor with one as
            ``backbone``, with its weights.

    Returns:
        Tuple[Dict[str, Tensor], dict, float]: The state dict, the arguments with which
        ``timm.create_model('vit_base_patch16_224', ...)`` makes its model, and the eps
        of the norms, which goes into timm's ``norm_layer``.

    Raises:
        CheckpointError: With everything in which the model differs from timm's.
    """
    backbone = getattr(model, 'backbone', model)
    if not isinstance(backbone, SPViT):
        raise CheckpointError(
            f'`--to timm` converts an SPViT, and this is a {type(backbone).__name__}.'
        )
    differences = [*_structure(backbone), *_layers(backbone)]
    head, head_differences = _head(model, backbone)
    differences += head_differences
    if differences:
        raise CheckpointError(
            "timm's VisionTransformer computes something else; nothing was written:\n  "
            + '\n  '.join(differences)
        )
    priors = tuple(
        f'backbone.{name}.'
        for name, module in backbone.named_modules()
        if isinstance(module, SpatialPrior)
    )
    ours = {
        key: value
        for key, value in backbone.state_dict(prefix='backbone.').items()
        if not key.startswith(priors)
        and not key.endswith(('.train_grid', '.attn.score', '.attn.kept'))
    }
    state, unplaced = to_theirs(ours, names.ALL)
    if unplaced:
        raise CheckpointError(
            "timm's VisionTransformer has no such weights; nothing was written:\n  "
            + '\n  '.join(unplaced)
        )
    if head is not None:
        for leaf, value in head.state_dict().items():
            state[f'head.{leaf}'] = value.clone()
    return state, _arguments(backbone, head), backbone.ln1.eps


def _structure(backbone):
    """In what the model differs around its layers, in words."""
    stem = backbone.patch_embed
    if not isinstance(stem, PatchEmbed):
        yield f"its stem is a {type(stem).__name__}, and timm's one convolution (stem)"
    else:
        conv = stem.projection
        if conv.kernel_size != conv.stride or stem.norm is not None:
            yield 'its patches overlap or are normed (patch_cfg)'
    if backbone.cls_token_layer != 0:
        where = backbone.cls_token_layer
        how = 'it has no class token' if where is None else f'it joins at layer {where}'
        yield f"{how}, and timm's comes first (cls_token_layer=0)"
    if backbone.pos_embed is None:
        yield 'it has no position embedding (pos_embed=None)'
    eps = {norm.eps for norm in backbone.modules() if isinstance(norm, nn.LayerNorm)}
    if len(eps) > 1:
        yield f'its norms have several eps, {sorted(eps)}'
    if not backbone.final_norm:
        yield 'it has no final norm (final_norm=False)'


def _layers(backbone):
    """In what the layers differ, in words."""
    hw, omega, first = tuple(backbone.patch_resolution), None, backbone.layers[0]
    for prior in backbone.modules():
        if isinstance(prior, ConstantSpatialPrior) and prior.grid != hw:
            yield f'its priors are folded for the grid {prior.grid}, not for {hw}'
            return
    if backbone.prior is not None:
        omega = evaluate_priors(backbone.prior, backbone.bias_prior, hw)
    for i, layer in enumerate(backbone.layers):
        differences = []
        if layer.branch_scale != 1:
            differences.append(f'skip_scale is {1 / layer.branch_scale:g} and not 1')
        if layer.peg is not None:
            differences.append('a PEG follows (with_peg)')
        for norm in {type(layer.ln1), type(layer.ln2)} - {nn.LayerNorm}:
            differences.append(f'its norm is {norm.__name__}')
        if layer.attn.num_heads != first.attn.num_heads:
            differences.append(f'{layer.attn.num_heads} heads, unlike layer 0')
        act = ffn_act(layer.ffn)
        if act not in ACTS or act != ffn_act(first.ffn):
            differences.append(f'its FFN has {act}, not GELU or QuickGELU in all')
        differences += _attention(layer.attn, hw, omega)
        yield from (f'layer {i}: {words}' for words in differences)


def _attention(attn, hw, omega):
    """In what an attention differs, in words; ``omega`` is that of all layers."""
    yield from scores_apart(attn)
    if type(attn) is not SpatialPriorAttention:
        return
    prior, bias, keep = attn.score_tables(hw, omega=omega)
    for what, table, neutral in (
        ('multiplies its scores by', prior, 1),
        ('adds to its scores', bias, 0),
    ):
        if table is not None and (table != neutral).any():
            low, high = table.min().item(), table.max().item()
            yield f'its prior {what} {low:.4g} to {high:.4g}'
    if keep is not None and not keep.all():
        yield 'its prior masks offsets'


def scores_apart(attn):
    """In what an attention differs beside its prior, in words, from the other codes."""
    if type(attn) not in (MultiheadAttention, SpatialPriorAttention):
        yield f'it attends with {type(attn).__name__}'
    elif type(attn) is SpatialPriorAttention and attn.scale != attn.head_dims**-0.5:
        yield f'it scales its scores by {attn.scale:g} (qk_scale)'


def ffn_act(ffn):
    """The name of an FFN's activation; of another FFN, its class."""
    if type(ffn) is not FFN or ffn.num_fcs != 2:
        return type(ffn).__name__
    act = ffn.layers[0][1]
    exact = getattr(act, 'approximate', 'none') == 'none'
    return type(act).__name__ if exact else str(act)


def _head(model, backbone):
    """The last layer of a classifier, None without one, and in what it differs."""
    head = getattr(model, 'head', None)
    if head is None:
        return None, []
    name, refused = HEADS.get(type(head), (None, ()))
    if name is None:
        return None, [f'its head is a {type(head).__name__}']
    if backbone.out_type != 'cls_token':
        return None, [f'its head reads out_type={backbone.out_type!r}, no class token']
    modules = dict(head.named_modules())
    return modules[name], [
        *input_apart(model, backbone),
        *(f'its head has {other}' for other in refused if other in modules),
    ]


def input_apart(model, backbone):
    """In what the head's input differs from that of the other codes, in words."""
    last = max(backbone.out_indices)
    if last != backbone.num_layers - 1:
        yield f'its head reads layer {last} (out_indices), not the last'
    if getattr(model, 'neck', None) is not None:
        yield f'its head reads a {type(model.neck).__name__} (neck)'


def _arguments(backbone, head):
    first = backbone.layers[0]
    return dict(
        img_size=tuple(backbone.img_size),
        patch_size=tuple(backbone.patch_embed.projection.kernel_size),
        in_chans=backbone.patch_embed.projection.in_channels,
        num_classes=0 if head is None else head.out_features,
        embed_dim=backbone.embed_dims,
        depth=backbone.num_layers,
        num_heads=first.attn.num_heads,
        mlp_ratio=first.ffn.feedforward_channels / backbone.embed_dims,
        qkv_bias=first.attn.qkv.bias is not None,
        init_values=1e-5 if hasattr(first.attn.gamma1, 'weight') else None,
        pre_norm=not isinstance(backbone.pre_norm, nn.Identity),
        act_layer=ACTS[ffn_act(first.ffn)],
    )
