"""Converting a checkpoint file: read, infer, rename, check, write."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from mmengine.logging import MMLogger

from ..models import SPViT
from ..utils import (
    CheckpointError,
    check_new_file,
    read_checkpoint,
    whole_file,
    write_checkpoint,
)
from ..version import __version__
from . import names
from .config import NORMALIZATIONS, config_text, model_cfg
from .released import check_released, to_released
from .state import pick_state_dict, to_ours
from .structure import build, check_state, find_arch, infer_structure
from .to_timm import to_timm

SOURCES = ('auto', 'spvit', 'lvvit', 'deit', 'timm')
TARGETS = ('mm', 'spvit', 'timm')
SUFFIXES = ('.pth', '.safetensors')
CHOICES = dict(
    weights=('auto', 'ema', 'plain'),
    classifier=('auto', 'tokenlabel', 'plain', 'none'),
    distilled=('refuse', 'drop'),
    act=('gelu', 'quick_gelu'),
    normalization=(None, *NORMALIZATIONS),
)


@dataclass
class Options:
    """What the weights alone do not say. None: inferred, or the source's habit."""

    weights: str = 'auto'  # EMA where there is one
    # Of deit and timm, whose layers are vanilla: how many become SP-SA (None: all but
    # the last two), with neutral priors of so many hidden units.
    num_spsa_layers: Optional[int] = None
    hidden_dims: int = 32
    cls_token_layer: Optional[int] = None
    num_heads: Optional[int] = None
    skip_scale: Optional[float] = None
    norm_eps: Optional[float] = None
    img_size: Optional[tuple] = None  # (h, w), for a grid that is not square
    act: str = 'gelu'  # 'quick_gelu' in OpenAI's CLIP
    classifier: str = 'auto'  # 'plain' leaves an auxiliary head out, 'none' all heads
    distilled: str = 'refuse'  # or 'drop' its second token
    normalization: Optional[str] = None  # of the config
    test_crop: Optional[float] = None  # of the config

    def __post_init__(self):
        for name, accepted in CHOICES.items():
            _check_choice(name, getattr(self, name), accepted)
        for name in ('test_crop', 'norm_eps'):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise CheckpointError(f'`{name}` must lie in (0, 1], got {value}.')


@dataclass
class Conversion:
    """A converted checkpoint before it is written."""

    state_dict: dict
    source: str
    # What was inferred, assumed or changed.
    notes: list
    # For the config; with another target there is none.
    model: Optional[dict] = None  # of timm with `--to timm`
    normalization: str = 'imagenet'
    test_crop: float = 1.0


def _check_choice(name, value, accepted):
    if value not in accepted:
        raise CheckpointError(f'`{name}` must be one of {accepted}, got {value!r}.')


def convert_file(
    src,
    out,
    source='auto',
    target='mm',
    options=None,
    force=False,
    trust=False,
    model=None,
):
    """Convert a checkpoint file, and write the config beside it.

    Args:
        src (str | Path): The file to read.
        out (str | Path): The checkpoint to write, ending in ``.pth`` or
            ``.safetensors``; its config gets the same name with ``.py``.
        source (str): 'spvit', 'lvvit', 'deit', 'timm' or 'auto'.
            Defaults to 'auto'.
        target (str): 'mm': ours. 'spvit': from ours to the names of the
            released code, without a config. 'timm': from ours to the names of timm's
            VisionTransformer, likewise. Defaults to 'mm'.
        options (Options, optional): What the weights do not say.
        force (bool): Overwrite what exists. Defaults to False.
        trust (bool): See :func:`~spvit_mm.utils.read_checkpoint`. Defaults to False.
        model (nn.Module, optional): For 'timm' the model with the weights of ``src``:
            these alone do not say whether timm's computes the same. For 'spvit' with any
            weights; without it a note warns.

    Returns:
        Conversion: What was written.

    Raises:
        UserError: If a file to write exists and ``force`` is False, or (a
            CheckpointError) the source cannot be read or converted. Nothing is
            written then.
    """
    _check_choice('target', target, TARGETS)
    src, out = Path(src).expanduser(), Path(check_new_file(str(out), SUFFIXES, force))
    if out.exists() and src.exists() and out.samefile(src):
        raise CheckpointError(f'`out` is the source itself, `{src}`.')
    if target == 'mm':
        check_new_file(str(out.with_suffix('.py')), ('.py',), force)

    if target == 'timm':
        result = convert_to_timm(model)
    elif target == 'spvit':
        result = convert_to_released(read_checkpoint(src, trust), options, model)
    else:
        result = convert_to_mm(read_checkpoint(src, trust), source, options)
    logger = MMLogger.get_current_instance()
    for note in result.notes:
        logger.info(note)
    checkpoint = dict(state_dict=result.state_dict)
    # Both files are whole before either takes its place.
    with ExitStack() as stack:
        if target == 'mm':
            checkpoint['meta'] = dict(
                spvit_mm_version=__version__,
                source=result.source,
                converted_from=src.name,
            )
            text = config_text(src.name, out.name, result)
            config = stack.enter_context(whole_file(str(out.with_suffix('.py'))))
            Path(config).write_text(text, encoding='utf-8')
        write_checkpoint(checkpoint, out)
    logger.info(f'Wrote {out}' + (' and its config.' if target == 'mm' else '.'))
    return result


def convert_to_mm(content, source='auto', options=None):
    """Convert the content of a file to our names.

    Args:
        content (object): What :func:`~spvit_mm.utils.read_checkpoint` returned.
        source (str): See :func:`convert_file`.
        options (Options, optional): See :class:`Options`.

    Returns:
        Conversion: State dict, what its config needs, and notes.

    Raises:
        CheckpointError: If any weight finds no place, or is missing.
    """
    options = options or Options()
    state, entry = pick_state_dict(content, options.weights)
    source = _resolve_source(source, state, content)
    notes = [f'Weights: `{entry}`, as {source} (`--from`).']
    state = _without_distillation(state, options, notes)
    state = _without_pretraining(state, options, notes)
    # DeiT III's names of its layer scales -> timm's.
    state = {re.sub(r'\bgamma_([12])$', r'ls\1.gamma', k): v for k, v in state.items()}
    backbone, head, pos_extra = infer_structure(state, options.img_size)
    # What is asked for must be what the weights are.
    is_vit = source in ('deit', 'timm')
    if options.classifier == 'tokenlabel':
        if head is None:
            raise CheckpointError('`--classifier tokenlabel`: the file has no head.')
        head['type'] = 'TokenLabelClsHead'
    if options.num_heads is not None:
        backbone['arch']['num_heads'] = options.num_heads
    if options.num_spsa_layers is not None and not is_vit:
        backbone['num_spsa_layers'] = options.num_spsa_layers
    check_state(state, backbone, head, pos_extra)
    ours = to_ours(state, names.ALL)
    if head is None:
        notes.append(
            'It has no head, so this is the backbone alone, a start of training: the '
            'config has a new head for the 1000 classes of ImageNet-1k.'
        )
    elif options.classifier == 'plain' and head['type'] == 'TokenLabelClsHead':
        head['type'] = 'VisionTransformerClsHead'
        ours = {k: v for k, v in ours.items() if not k.startswith('head.aux_head.')}
        notes.append(
            'Left out, as asked: the auxiliary head. The source adds half of its maximum '
            'to the logits; these are the class token alone.'
        )
    is_clip = backbone['pre_norm']
    eps = 1e-6 if is_vit and not is_clip else 1e-5
    _say_what_no_weight_shows(backbone, options, eps, notes)
    if is_vit:
        _make_spsa(backbone, options, notes)
    _place_cls_token(backbone, pos_extra, source, content, options, notes)
    # The model knows how to fit the position embedding. Its new priors are neutral,
    # and the same ones each time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(backbone, head)
    ours['backbone.train_grid'] = model.backbone.train_grid
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected, unexpected
    assert all('.attn.prior.' in key for key in missing), missing
    number = sum(param.numel() for param in model.parameters())
    notes.append(f'The model has {number:,} parameters, in float32.')

    habit = 'half' if source == 'timm' and head is not None else 'imagenet'
    normalization = options.normalization or ('clip' if is_clip else habit)
    crop = options.test_crop or _test_crop(source, backbone)
    notes.append(
        f"The config tests with crop {crop} and normalization '{normalization}', as is "
        'the habit of such models; no weight shows either (`--test-crop`, '
        '`--normalization`).'
    )
    if backbone['in_channels'] != 3:
        notes.append('The training pipeline of the config is for images of 3 channels.')
    cfg = model_cfg(backbone, head)
    return Conversion(model.state_dict(), source, notes, cfg, normalization, crop)


def convert_to_released(content, options=None, model=None):
    """Convert the content of a checkpoint of ours to the released names.

    Args:
        content (dict): Of the checkpoint.
        options (Options, optional): Its ``weights`` are looked at.
        model (nn.Module, optional): The model of the checkpoint, with any weights, to
            be asked for what none shows. Defaults to None: a note warns.

    Raises:
        CheckpointError: If any weight has no counterpart there, or the released code
            would compute something else with them.
    """
    state, entry = pick_state_dict(content, (options or Options()).weights)
    seen = []
    if model is None:
        seen.append(
            'WARNING: no weight shows how a prior is used, nor skip scale, eps, the '
            'activations and where the class token joins. Name its config with '
            '`--config` (in Python: model=) to have them checked.'
        )
    else:
        seen += check_released(model, state)
    out, notes = to_released(state)
    notes += seen
    return Conversion(out, 'mm', [f'Weights: `{entry}`.', *notes])


def convert_to_timm(model):
    """Convert a model of ours with neutral priors, or none, to timm's names.

    Args:
        model (nn.Module): See :func:`~spvit_mm.convert.to_timm.to_timm`.

    Returns:
        Conversion: Its ``model`` are the arguments of timm's VisionTransformer.

    Raises:
        CheckpointError: With everything in which timm's computes something else.
    """
    state, arguments, eps = to_timm(model)
    given = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
    notes = [
        'Its priors change nothing on the grid of the training, so they are left out.',
        "timm makes the model by timm.create_model('vit_base_patch16_224', "
        f'{given}, norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})).',
    ]
    if not arguments['num_classes']:
        notes.append('It is the backbone alone.')
    return Conversion(state, 'mm', notes, arguments)


def _resolve_source(source, state, content):
    """Tell the source by the keys; deit and timm have the same."""
    if any(key.startswith('backbone.') for key in state):
        raise CheckpointError(
            'This is a checkpoint of OpenMMLab, which needs no conversion: say '
            "load_from=FILE, or init_cfg=dict(type='Pretrained', checkpoint=FILE, "
            "prefix='backbone') in the backbone. `--to spvit` converts it back."
        )
    if any('.pos_block.' in key or '.attn.qk.' in key for key in state):
        found = ('spvit',)
    elif 'patch_embed.conv1.weight' in state:
        found = ('lvvit',)
    elif 'model' in content or 'dist_token' in state:
        # Only their releases differ, in normalization and test crop.
        found = ('deit', 'timm')
    else:
        found = ('timm', 'deit')
    if source == 'auto':
        return found[0]
    if source not in found:
        # A released SP-ViT without SP-SA and PEG would be an LV-ViT.
        raise CheckpointError(
            f'`--from {source}` does not fit: the keys are those of {found[0]}. Take '
            f'`--from {found[0]}` or `--from auto`.'
        )
    return source


def _without_distillation(state, options, notes):
    """Leave out the second token of a distilled DeiT and its head."""
    if 'dist_token' not in state:
        return state
    if options.distilled == 'refuse':
        raise CheckpointError(
            'This is a distilled DeiT: it has a distillation token with a head of its '
            'own, and SP-ViT has the class token alone. `--distilled drop` leaves them '
            'out; the outputs then differ, so take it as a start of training.'
        )
    dropped = [key for key in state if key.startswith(('dist_token', 'head_dist.'))]
    state = {key: value for key, value in state.items() if key not in dropped}
    position = state.get('pos_embed')
    if position is not None and position.ndim == 3:
        state['pos_embed'] = torch.cat((position[:, :1], position[:, 2:]), 1)
    notes.append(
        f'Left out of the distilled model: {", ".join(dropped)}, pos_embed[:, 1]. Its '
        "outputs are NOT the source's until trained."
    )
    return state


def _without_pretraining(state, options, notes):
    """Leave out what only the pretraining used: mask token, MAE's decoder, the heads."""
    for name in ('reg_token', 'register_tokens'):
        if name in state:
            raise CheckpointError(
                f'This model has register tokens (`{name}`), to which all layers attend, '
                'and SPViT has the class token alone: without them it computes something '
                'else. Take the model of that name without registers (dinov2_vits14 '
                'for dinov2_vits14_reg).'
            )
    unused = ('mask_token', 'decoder_')
    if options.classifier == 'none':
        unused += ('head.', 'aux_head.', 'pre_logits.')
    dropped = [key for key in state if key.startswith(unused)]
    if dropped:
        notes.append(
            f'Left out, as the backbone has no use for it: {", ".join(dropped[:5])}'
            + (f' and {len(dropped) - 5} more.' if len(dropped) > 5 else '.')
        )
    return {key: value for key, value in state.items() if key not in dropped}


def _say_what_no_weight_shows(backbone, options, eps, notes):
    """Put heads, skip scale and eps into the arguments of an SPViT."""
    arch, with_stem = backbone['arch'], backbone['stem'] != 'patch'
    published = SPViT.arch_zoo.get(find_arch(backbone), {})
    num_heads, skip_scale = arch['num_heads'], options.skip_scale
    if num_heads is None:
        width = arch['embed_dims']
        num_heads = published.get('num_heads', None if width % 64 else width // 64)
    if skip_scale is None:
        skip_scale = published.get('skip_scale', None if with_stem else 1.0)
    if num_heads is None or skip_scale is None:
        raise CheckpointError(
            f'No weight shows heads ({num_heads}) and skip scale ({skip_scale}), and '
            f'{arch} are the layers of no published model. Say what is None with '
            '`--num-heads N` or `--skip-scale S` (released: 2 for S and M, 3 for L).'
        )
    eps = options.norm_eps or eps
    arch['num_heads'] = num_heads
    backbone.update(skip_scale=skip_scale, norm_cfg=dict(type='LN', eps=eps))
    if options.act == 'quick_gelu':
        act_cfg = dict(type='mmpretrain.QuickGELU')
        backbone['layer_cfgs'] = dict(act_cfg=act_cfg)
    notes.append(
        f'{num_heads} heads, skip scale {skip_scale}, eps {eps}: what no weight shows is '
        'that of the published models (`--num-heads`, `--skip-scale`, `--norm-eps`).'
    )
    if backbone['pre_norm']:
        notes.append(
            f'A norm before the layers, as in CLIP. The activation is {options.act}: no '
            "weight shows it. OpenAI's own weights want `--act quick_gelu`, those of "
            'OpenCLIP mostly gelu.'
        )


def _make_spsa(backbone, options, notes):
    """Let the first layers of a plain ViT be SP-SA."""
    number, hidden = options.num_spsa_layers, options.hidden_dims
    if number is None:
        number = max(backbone['arch']['num_layers'] - 2, 0)
    backbone['num_spsa_layers'] = number
    backbone['prior'] = dict(type='MLPSpatialPrior', hidden_dims=hidden)
    notes.append(
        f'The first {number} layers are SP-SA with new, neutral priors of hidden width '
        f'{hidden}: they compute what the source does.'
    )


def _place_cls_token(backbone, pos_extra, source, content, options, notes):
    """Say where the class token joins: if not asked for, where it does in the source."""
    depth, number = backbone['arch']['num_layers'], backbone['num_spsa_layers']
    layer = options.cls_token_layer
    if layer is None and (source != 'spvit' or pos_extra):
        layer = 0
    if layer is None and number:
        layer = min(number, depth - 1)
    if layer is None:
        layer = getattr(content.get('args'), 'local_up_to_layer', None)
        why = 'the file says so (args.local_up_to_layer)'
        if not isinstance(layer, int) or not 0 < layer < depth:
            layer = max(depth - 2, 0)
            why = "no weight shows where; all but the last two is the paper's rule"
        notes.append(
            'No layer is SP-SA, as in the released SP-ViT-L (the L of the paper has 22), '
            'yet the class token has no position, so it joins late: before layer '
            f'{layer} ({why}; `--cls-token-layer`).'
        )
    if pos_extra and layer:
        notes.append(
            f'The class token joins before layer {layer} and has no position there: its '
            'entry of pos_embed was added to cls_token. Outputs differ from the '
            "source's until trained; with the class token first they are equal."
        )
    backbone['cls_token_layer'] = layer


def _test_crop(source, backbone):
    if source in ('spvit', 'lvvit'):
        return 0.9 if backbone['arch']['embed_dims'] <= 384 else 1.0
    if min(backbone['img_size']) > 224:
        return 1.0
    return 0.875 if source == 'deit' else 0.9
