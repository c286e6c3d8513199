"""The config beside a converted checkpoint."""

from mmpretrain.registry import MODELS

from ..models import SPViT
from ..utils import CheckpointError

SKELETONS = {
    (384, 16): 'spvit-small',
    (512, 20): 'spvit-medium',
    (768, 24): 'spvit-large',
}
DROP_PATH = {'spvit-small': 0.1, 'spvit-medium': 0.2, 'spvit-large': 0.3}
IMAGENET_NORM = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
HALF_NORM = ([127.5] * 3, [127.5] * 3)
NORMALIZATIONS = {'imagenet': IMAGENET_NORM, 'half': HALF_NORM}


def backbone_cfg(
    structure, num_heads, skip_scale, norm_eps, num_spsa_layers, cls_token_layer, hidden
):
    """The SPViT of a structure; names its arch where one has all its numbers."""
    with_stem = structure.stem_channels is not None
    cfg = dict(type='SPViT')
    settings = dict(
        embed_dims=structure.embed_dims,
        num_layers=structure.num_layers,
        num_heads=num_heads,
        feedforward_channels=structure.feedforward_channels,
    )
    arch = _arch_name(settings, with_stem)
    cfg['arch'] = arch or settings
    cfg['img_size'] = _short(structure.img_size)
    cfg['patch_size'] = _short(structure.patch_size)
    if structure.in_channels != 3:
        cfg['in_channels'] = structure.in_channels
    cfg['num_spsa_layers'] = num_spsa_layers
    cfg['cls_token_layer'] = cls_token_layer

    implied = SPViT.arch_zoo[arch] if arch else {}
    wanted = dict(
        stem=dict(type='ConvStem', stem_channels=structure.stem_channels)
        if with_stem
        else 'patch',
        with_peg=structure.with_peg,
        skip_scale=skip_scale,
        qkv_bias=structure.qkv_bias,
        norm_cfg=dict(type='LN', eps=norm_eps),
    )
    default = dict(
        stem='patch',
        with_peg=False,
        skip_scale=1.0,
        qkv_bias=True,
        norm_cfg=dict(type='LN', eps=1e-6),
    )
    if num_spsa_layers:
        wanted['prior'] = dict(type='MLPSpatialPrior', hidden_dims=hidden)
    for name, value in wanted.items():
        if implied.get(name, default.get(name)) != value:
            cfg[name] = value
    if structure.layer_scale:
        cfg['layer_scale_init_value'] = 1e-5
    if arch in DROP_PATH:
        cfg['drop_path_rate'] = DROP_PATH[arch]
    return cfg


def _arch_name(settings, with_stem):
    if with_stem:
        name = SKELETONS.get((settings['embed_dims'], settings['num_layers']))
        candidates = [name] if name else []
    else:
        candidates = ['deit-tiny', 'deit-small', 'deit-base', 'deit-small-9h', 'large']
    for name in candidates:
        arch = SPViT.arch_zoo[name]
        if all(arch[key] == value for key, value in settings.items()):
            return name
    return None


def model_cfg(structure, backbone, classifier):
    """The classifier around a backbone: 'tokenlabel' or 'plain'."""
    head = dict(
        type='VisionTransformerClsHead',
        num_classes=structure.num_classes,
        in_channels=structure.embed_dims,
    )
    if classifier == 'tokenlabel':
        return dict(
            type='TokenLabelClassifier',
            backbone=dict(backbone, out_type='raw', final_norm=True),
            neck=None,
            head=dict(head, type='TokenLabelClsHead'),
        )
    if structure.pre_logits_dims:
        head['hidden_dim'] = structure.pre_logits_dims
    head['loss'] = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    return dict(type='ImageClassifier', backbone=backbone, neck=None, head=head)


def check_loads(model, state):
    """Build the backbone of a model config and load its weights, strictly.

    Raises:
        CheckpointError: If the config and the weights do not fit each other.
    """
    backbone = MODELS.build(dict(model['backbone'], _scope_='mmpretrain'))
    prefix = 'backbone.'
    part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(part, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f'The converted weights do not fit the config that belongs to them: {error}'
        ) from error


TEMPLATE = """\
# Written by tools/model_converters/convert.py from {source}.
{notes}_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['spvit_mm'], allow_failed_imports=False)

model = {model}

data_preprocessor = {preprocessor}

train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = {train_size}
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type={resize},
        scale={scale},{comment}{edge}
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size={crop}),
    dict(type='PackInputs'),
]
{train}
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={{
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
        }}
    ),
    clip_grad=dict(max_norm=5.0),
)

load_from = '{{{{ fileDirname }}}}/{checkpoint}'
"""

TRAIN = 'train_dataloader = dict(dataset=dict(pipeline=train_pipeline))'
TRAIN_WITH_LABEL_MAPS = """\
train_pipeline[1]['type'] = 'TokenLabelRandomResizedCrop'
train_pipeline[2]['type'] = 'TokenLabelRandomFlip'
train_pipeline[5]['type'] = 'PackTokenLabelInputs'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TokenLabelDataset',
        dataset=dict(type='ImageNet', data_root='data/imagenet', split='train'),
        label_root='data/label_top5_train_nfnet',
        pipeline=train_pipeline,
    )
)"""


def config_text(source, checkpoint, model, structure, normalization, crop, notes=()):
    """The text of a config that tests and trains the model of a checkpoint.

    Args:
        source (str): Name of the file that was converted.
        checkpoint (str): Name of the checkpoint beside the config.
        model (dict): The model config.
        structure (Structure): For image size and classes.
        normalization (str): 'imagenet' or 'half' (mean and std 127.5).
        crop (float): The test crop: the image's part of its resized side.
        notes (Sequence[str]): Comments at the top.
    """
    height, width = structure.img_size
    mean, std = NORMALIZATIONS[normalization]
    if structure.in_channels != 3:
        mean, std = mean[:1] * structure.in_channels, std[:1] * structure.in_channels
    preprocessor = dict(
        num_classes=structure.num_classes,
        mean=mean,
        std=std,
        to_rgb=structure.in_channels == 3,
    )
    if height == width:
        resize, edge = 'ResizeEdge', "\n        edge='short',"
        scale, comment = int(width / crop), f'  # {width} / {crop}'
        size = width
    else:
        # mmcv names sizes as (width, height).
        resize, edge = 'Resize', ''
        scale, comment = (int(width / crop), int(height / crop)), f'  # by {crop}'
        size = (width, height)
    return TEMPLATE.format(
        source=repr(source),
        notes=''.join(_comment(note) for note in notes),
        model=format_value(model),
        preprocessor=format_value(preprocessor),
        train_size=size,
        train=TRAIN_WITH_LABEL_MAPS
        if model['type'] == 'TokenLabelClassifier'
        else TRAIN,
        resize=repr(resize),
        scale=scale,
        comment=comment,
        edge=edge,
        crop=size,
        checkpoint=checkpoint.replace("'", "\\'"),
    )


def format_value(value, indent=0):
    """A value as Python text, dicts as ``dict(...)``, long ones a key a line."""
    if not isinstance(value, dict):
        return repr(value)
    items = [f'{key}={format_value(item, indent + 4)}' for key, item in value.items()]
    line = f'dict({", ".join(items)})'
    if len(line) + indent < 72 and '\n' not in line:
        return line
    pad = ' ' * (indent + 4)
    return 'dict(\n' + ''.join(f'{pad}{item},\n' for item in items) + ' ' * indent + ')'


def _comment(text, width=78):
    lines, line = [], '#'
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = '#'
        line += ' ' + word
    return '\n'.join([*lines, line]) + '\n'


def _short(size):
    return size[0] if size[0] == size[1] else tuple(size)
