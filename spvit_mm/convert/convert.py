"""Converting a checkpoint file: read, infer, rename, check, write."""

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from mmengine.logging import MMLogger

from ..utils import CheckpointError, read_checkpoint
from ..version import __version__
from . import config
from .state import (
    add_neutral_priors,
    as_float32,
    drop_distillation,
    pick_state_dict,
    place_cls_position,
    to_ours,
    to_released,
)
from .structure import (
    SOURCES,
    count_parameters,
    detect_source,
    find_heads,
    find_skip_scale,
    infer_structure,
)

TARGETS = ('mm', 'spvit')
CLASSIFIERS = ('auto', 'tokenlabel', 'plain')
DISTILLED = ('refuse', 'drop')


@dataclass
class Options:
    """What the weights alone do not say. None: inferred, or the source's habit.

    Args:
        weights (str): 'ema', 'plain' or 'auto' (EMA where there is one).
        num_spsa_layers (int, optional): For deit and timm, whose layers are all
            vanilla: how many of the first become SP-SA, with neutral priors.
            Defaults to None: all but the last two.
        cls_token_layer (int, optional): Where the class token joins. Defaults
            to None: where it does in the source (deit, timm, lvvit: first;
            spvit: after its SP-SA layers).
        hidden_dims (int): Hidden width of those new priors. Defaults to 32.
        num_heads (int, optional): Where no prior shows it.
        skip_scale (float, optional): Divisor of the residual branches.
        norm_eps (float, optional): Of the layer norms; None: 1e-5 for spvit
            and lvvit, 1e-6 for deit and timm.
        img_size (Tuple[int, int], optional): The training image, (h, w) in
            pixels, for a grid that is not square.
        classifier (str): 'tokenlabel' keeps an auxiliary head, 'plain' leaves
            it out (said in the log), 'auto' keeps it if there is one.
        distilled (str): 'refuse' a distilled DeiT or 'drop' its second token.
        normalization (str, optional): 'imagenet' or 'half', for the config.
            None: 'half' for timm, else 'imagenet'.
        test_crop (float, optional): The test crop, for the config.
    """

    weights: str = 'auto'
    num_spsa_layers: Optional[int] = None
    cls_token_layer: Optional[int] = None
    hidden_dims: int = 32
    num_heads: Optional[int] = None
    skip_scale: Optional[float] = None
    norm_eps: Optional[float] = None
    img_size: Optional[tuple] = None
    classifier: str = 'auto'
    distilled: str = 'refuse'
    normalization: Optional[str] = None
    test_crop: Optional[float] = None


@dataclass
class Conversion:
    """A converted checkpoint before it is written.

    Attributes:
        state_dict (Dict[str, Tensor]): The weights under their new names.
        model (dict, optional): The model config, None with ``--to spvit``.
        config (str, optional): The text of the config file, likewise.
        source (str): What it was converted from.
        notes (List[str]): What was inferred, assumed or changed.
    """

    state_dict: dict
    source: str
    model: Optional[dict] = None
    config: Optional[str] = None
    notes: list[str] = field(default_factory=list)


def convert_file(
    src, out, source='auto', target='mm', options=None, force=False, trust=False
):
    """Convert a checkpoint file, and write the config beside it.

    Args:
        src (str | Path): The file to read.
        out (str | Path): The checkpoint to write, ending in ``.pth``; its
            config gets the same name with ``.py``.
        source (str): 'spvit', 'lvvit', 'deit', 'timm' or 'auto'.
            Defaults to 'auto'.
        target (str): 'mm': ours. 'spvit': from ours to the names of the
            released code, without a config. Defaults to 'mm'.
        options (Options, optional): What the weights do not say.
        force (bool): Overwrite what exists. Defaults to False.
        trust (bool): See :func:`~spvit_mm.utils.read_checkpoint`. Defaults to False.

    Returns:
        Conversion: What was written.

    Raises:
        CheckpointError: If the file cannot be read or converted. Nothing is
            written then.
        FileExistsError: If a file to write exists and ``force`` is False.
    """
    options = options or Options()
    _check_choices(source=(source, ('auto', *SOURCES)), target=(target, TARGETS))
    src, out = Path(src), Path(out)
    paths = [out] if target == 'spvit' else [out, out.with_suffix('.py')]
    _check_outputs(src, paths, force)

    content = read_checkpoint(src, trust)
    if target == 'spvit':
        result = convert_to_released(content, options)
    else:
        result = convert_to_mm(content, source, options, src.name, out.name)
    logger = MMLogger.get_current_instance()
    for note in result.notes:
        logger.info(note)

    checkpoint = dict(state_dict=result.state_dict)
    if target == 'mm':
        checkpoint['meta'] = dict(
            spvit_mm_version=__version__, source=result.source, converted_from=src.name
        )
    _write(paths, checkpoint, result.config, force)
    logger.info('Wrote ' + ' and '.join(str(path) for path in paths))
    return result


def convert_to_mm(
    content, source='auto', options=None, src_name='', out_name='out.pth'
):
    """Convert the content of a file to our names, with its config.

    Args:
        content (object): What :func:`~spvit_mm.utils.read_checkpoint` returned.
        source (str): See :func:`convert_file`.
        options (Options, optional): See :class:`Options`.
        src_name (str): Name of the source file, for the config's comment.
        out_name (str): Name of the checkpoint, for the config.

    Returns:
        Conversion: State dict, model config, config text and notes.
    """
    options = options or Options()
    _check_options(options)
    state, entry = pick_state_dict(content, options.weights)
    notes = [f'Weights: `{entry}`, {count_parameters(state):,} parameters.']
    source = _resolve_source(source, state, content, notes)
    state = _without_distillation(state, options, notes)
    structure = infer_structure(state, options.img_size)
    num_heads, why = find_heads(structure, options.num_heads)
    structure.num_heads = num_heads
    notes.append(
        f'{source}: {structure.num_layers} layers of width {structure.embed_dims}, '
        f'{num_heads} heads (by {why}), feedforward {structure.feedforward_channels}, '
        f'{structure.num_spsa_layers} SP-SA layers, PEG '
        f'{"yes" if structure.with_peg else "no"}, grid {structure.grid[0]} x '
        f'{structure.grid[1]}, {structure.num_classes} classes.'
    )
    is_vit = source in ('deit', 'timm')
    skip_scale = find_skip_scale(structure, options.skip_scale)
    ours = to_ours(state, structure)
    dtypes = as_float32(ours)
    if dtypes:
        notes.append(f'Weights of {", ".join(dtypes)} were stored as float32.')

    num_spsa_layers, hidden = structure.num_spsa_layers, structure.hidden_dims
    if is_vit:
        num_spsa_layers, hidden = _new_priors(structure, options)
        add_neutral_priors(ours, num_spsa_layers, num_heads, hidden)
        notes.append(
            f'The first {num_spsa_layers} layers are SP-SA with new, neutral priors of '
            f'hidden width {hidden}: they compute what the source does.'
        )
    elif options.num_spsa_layers not in (None, num_spsa_layers):
        raise CheckpointError(
            f'`num_spsa_layers` is {options.num_spsa_layers}, but the checkpoint has '
            f'{num_spsa_layers}. Only layers of deit and timm are made SP-SA.'
        )
    layer = _cls_token_layer(structure, source, content, options, notes)
    note = place_cls_position(ours, structure.pos_extra, layer)
    notes += [note] if note else []

    classifier = _classifier(structure, ours, options, notes)
    norm_eps = options.norm_eps or (1e-6 if is_vit else 1e-5)
    backbone = config.backbone_cfg(
        structure, num_heads, skip_scale, norm_eps, num_spsa_layers, layer, hidden
    )
    model = config.model_cfg(structure, backbone, classifier)
    config.check_loads(model, ours)

    normalization = options.normalization or (
        'half' if source == 'timm' else 'imagenet'
    )
    crop = options.test_crop or _test_crop(source, structure)
    notes.append(
        f"The config tests with crop {crop} and normalization '{normalization}', as is "
        f'the habit of {source}; no weight shows either (`--test-crop`, '
        '`--normalization`).'
    )
    text = config.config_text(
        src_name,
        out_name,
        model,
        structure,
        normalization,
        crop,
        _comments(model, layer),
    )
    return Conversion(ours, source, model, text, notes)


def convert_to_released(content, options=None):
    """Convert the content of a checkpoint of ours to the released names."""
    options = options or Options()
    _check_options(options)
    state, entry = pick_state_dict(content, options.weights)
    out, structure, notes = to_released(state)
    notes.insert(0, f'Weights: `{entry}`, {count_parameters(out):,} parameters.')
    number = structure.num_spsa_layers
    if structure.pos_extra and number:
        notes.append(
            'WARNING: here the class token comes first (cls_token_layer=0); the released '
            'code lets it join after the SP-SA layers and does not load the class '
            "token's entry of pos_embed unless it is changed."
        )
    elif not structure.pos_extra:
        layer = number or 'the cls_token_layer of this model'
        notes.append(
            f'In the released code set local_up_to_layer to {layer}: the class token '
            'joins there, so a cls_token_layer other than the number of SP-SA layers '
            'would compute something else.'
        )
    return Conversion(out, 'mm', notes=notes)


# --------------------------------------------------------------- decisions


def _check_choices(**choices):
    for name, (value, accepted) in choices.items():
        if value not in accepted:
            raise CheckpointError(f'`{name}` must be one of {accepted}, got {value!r}.')


def _check_options(options):
    _check_choices(
        classifier=(options.classifier, CLASSIFIERS),
        distilled=(options.distilled, DISTILLED),
        normalization=(options.normalization, (None, *config.NORMALIZATIONS)),
    )
    crop = options.test_crop
    if crop is not None and not 0 < crop <= 1:
        raise CheckpointError(f'`test_crop` must lie in (0, 1], got {crop}.')
    if options.norm_eps is not None and not options.norm_eps > 0:
        raise CheckpointError(f'`norm_eps` must be positive, got {options.norm_eps}.')
    if options.hidden_dims < 1:
        raise CheckpointError(
            f'`hidden_dims` must be a positive integer, got {options.hidden_dims}.'
        )


def _resolve_source(source, state, content, notes):
    found = detect_source(state)
    if found == 'vit':
        # The two have the same keys; only their releases differ in habit.
        found = 'deit' if 'model' in content or 'dist_token' in state else 'timm'
        if source == 'auto':
            notes.append(
                f"Taken as {found}: DeiT and timm share their keys, and DeiT's releases "
                'hold an entry `model`. If it is the other, say `--from` (it decides the '
                'normalization and test crop of the config, not the weights).'
            )
    family = {'deit': 'vit', 'timm': 'vit'}
    if source != 'auto' and family.get(source, source) != family.get(found, found):
        # A released SP-ViT without SP-SA and PEG would be an LV-ViT.
        raise CheckpointError(
            f'`--from {source}` does not fit: the keys are those of {found}. Take '
            f'`--from {found}` or `--from auto`.'
        )
    return found if source == 'auto' else source


def _without_distillation(state, options, notes):
    if 'dist_token' not in state and 'head_dist.weight' not in state:
        return state
    if options.distilled == 'refuse':
        raise CheckpointError(
            'This is a distilled DeiT: beside the class token it has a distillation '
            'token with a head of its own (`dist_token`, `head_dist`), and SP-ViT has '
            'one extra token only. `--distilled drop` leaves the second one out; the '
            'outputs then differ, so take it as a start of training alone.'
        )
    state, dropped = drop_distillation(state)
    notes.append(
        f'Left out of the distilled model: {", ".join(dropped)}. Its outputs are NOT the '
        "source's until trained."
    )
    return state


def _new_priors(structure, options):
    depth = structure.num_layers
    number = options.num_spsa_layers
    if number is None:
        number = max(depth - 2, 0)
    if not 0 <= number <= depth:
        raise CheckpointError(
            f'`num_spsa_layers` must lie in 0..{depth}, got {number}.'
        )
    return number, options.hidden_dims


def _cls_token_layer(structure, source, content, options, notes):
    last = structure.num_layers - 1
    asked, late = options.cls_token_layer, structure.pos_extra == 0
    if asked is not None:
        if not 0 <= asked <= last:
            raise CheckpointError(
                f'`cls_token_layer` must lie in 0..{last}, got {asked}.'
            )
        return asked
    if source != 'spvit' or not late:
        return 0
    if structure.num_spsa_layers:
        return min(structure.num_spsa_layers, last)
    args = content.get('args') if isinstance(content, dict) else None
    given = getattr(args, 'local_up_to_layer', None)
    if isinstance(given, int) and 0 < given <= last:
        layer, why = given, 'the file says so (args.local_up_to_layer)'
    else:
        layer = max(structure.num_layers - 2, 0)
        why = "no weight shows where; all but the last two is the paper's rule"
    notes.append(
        'No layer is SP-SA, as in the released SP-ViT-L, yet the class token has no '
        f'position, so it joins late: before layer {layer} ({why}; `--cls-token-layer`).'
    )
    return layer


def _classifier(structure, ours, options, notes):
    kind = options.classifier
    if kind == 'auto':
        kind = 'tokenlabel' if structure.with_aux_head else 'plain'
    if kind == 'tokenlabel' and not structure.with_aux_head:
        raise CheckpointError(
            "`classifier='tokenlabel'` needs an auxiliary head (`aux_head`), which the "
            "checkpoint has not. Take 'plain'."
        )
    if kind == 'plain' and structure.with_aux_head:
        dropped = [key for key in ours if key.startswith('head.aux_head.')]
        for key in dropped:
            del ours[key]
        notes.append(
            f'Left out, as asked: the auxiliary head ({", ".join(dropped)}). The source '
            'adds half of its maximum to the logits; these are the class token alone.'
        )
    return kind


def _test_crop(source, structure):
    side = min(structure.img_size)
    if source in ('spvit', 'lvvit'):
        return 0.9 if structure.embed_dims <= 384 else 1.0
    if side > 224:
        return 1.0
    return 0.875 if source == 'deit' else 0.9


def _comments(model, layer):
    if model['type'] == 'TokenLabelClassifier':
        yield (
            'Training it further needs label maps under `label_root`; testing does not. '
            'To train on images alone convert with --classifier plain.'
        )
    backbone = model['backbone']
    is_large = backbone['arch'] == 'spvit-large' and backbone.get('with_peg', True)
    if is_large and not backbone['num_spsa_layers']:
        yield (
            'An L without SP-SA layers, as the released code builds it; the L of the '
            f'paper has 22. The class token joins before layer {layer}.'
        )


# ----------------------------------------------------------------- writing


def _check_outputs(src, paths, force):
    if paths[0].suffix != '.pth':
        raise CheckpointError(f'`out` must end in .pth, got `{paths[0]}`.')
    for path in paths:
        if path.exists() and src.exists() and path.samefile(src):
            raise CheckpointError(f'`out` is the source itself, `{src}`.')
        if path.is_dir():
            raise CheckpointError(f'`{path}` is a directory, not a file to write.')
        if path.exists() and not force:
            raise FileExistsError(
                f'`{path}` exists and is not overwritten. Take another name or `--force`.'
            )
    folder = paths[0].absolute().parent
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f'`{folder}` is a file, not a folder to write into.')


def _write(paths, checkpoint, text, force):
    """Write all files beside their places first, then put them there."""
    folder = paths[0].absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=folder)
            temporary.append(name)
            with os.fdopen(handle, 'wb') as file:
                if path is paths[0]:
                    torch.save(checkpoint, file)
                else:
                    file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
        for name, path in zip(temporary, paths, strict=True):
            if path.exists() and not force:
                raise FileExistsError(f'`{path}` has appeared meanwhile; it is kept.')
            os.replace(name, path)
    finally:
        for name in temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
