"""The config beside a converted checkpoint: short, on one of this package's own.

It finds that one by importing the package, so that both files may lie anywhere, and
may go to another machine. (mmengine's ``package::config`` knows OpenMMLab's own
packages alone, and takes any expression for ``_base_``.)
"""

import textwrap

from mmengine.config import Config

from ..models import SPViT
from .structure import find_arch

BASES = {
    'TokenLabelClassifier': 'token_labeling/spvit-small_8xb128-tokenlabel-300e_in1k.py',
    'ImageClassifier': 'classification/sp-deit-small_4xb256_in1k.py',
}
DROP_PATH = {'spvit-small': 0.1, 'spvit-medium': 0.2, 'spvit-large': 0.3}
NORMALIZATIONS = {
    'imagenet': ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    'half': ([127.5] * 3, [127.5] * 3),
    'clip': ([122.771, 116.746, 104.094], [68.501, 66.632, 70.323]),
}


def model_cfg(backbone, head):
    """The config of a classifier; a published arch goes by its name.

    One without a head (None) gets that of ImageNet's classes, to be trained.
    """
    if head is None:
        width = backbone['arch']['embed_dims']
        head = dict(
            type='VisionTransformerClsHead', num_classes=1000, in_channels=width
        )
    cfg, name = dict(type='SPViT', **backbone), find_arch(backbone)
    if name and SPViT.arch_zoo[name]['num_heads'] == backbone['arch']['num_heads']:
        cfg.update(arch=name, drop_path_rate=DROP_PATH.get(name, 0.0))
    if head['type'] == 'TokenLabelClsHead':
        cfg['out_type'] = 'raw'
        return dict(type='TokenLabelClassifier', backbone=cfg, head=head)
    loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    return dict(type='ImageClassifier', backbone=cfg, head=dict(head, loss=loss))


TEMPLATE = """\
# Written by tools/model_converters/convert.py from {source}.
{notes}
_base_ = f'{{__import__("spvit_mm").__path__[0]}}/.mim/configs/{base}'

{settings}
train_pipeline = [
    {{**step, 'scale': {size}}} if 'RandomResizedCrop' in step['type'] else step
    for step in _base_.train_dataloader.dataset.pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

load_from = {checkpoint!r}
"""


def config_text(source, checkpoint, conversion):
    """The text of a config that tests and trains a converted model.

    ``source`` is the name of the file that was converted, ``checkpoint`` that of the
    one beside the config.
    """
    model, crop = conversion.model, conversion.test_crop
    channels = model['backbone']['in_channels']
    mean, std = NORMALIZATIONS[conversion.normalization]
    colours = {}
    if channels != 3:
        mean, std = mean[:1] * channels, std[:1] * channels
        colours['color_type'] = 'grayscale' if channels == 1 else 'unchanged'
    height, width = model['backbone']['img_size']
    if height == width:
        size = width
        resize = dict(type='ResizeEdge', scale=int(size / crop), edge='short')
    else:
        size = (width, height)  # mmcv's order
        resize = dict(type='Resize', scale=tuple(int(side / crop) for side in size))
    settings = dict(
        model=dict(model, _delete_=True),
        data_preprocessor=dict(
            num_classes=model['head']['num_classes'],
            mean=mean,
            std=std,
            to_rgb=channels == 3,
        ),
        test_pipeline=[
            dict(type='LoadImageFromFile', **colours),
            dict(resize, backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=size),
            dict(type='PackInputs'),
        ],
    )
    return TEMPLATE.format(
        source=repr(source),
        notes='\n'.join(map(_comment, conversion.notes)),
        base=BASES[model['type']],
        settings=Config(settings).pretty_text,
        size=size,
        checkpoint=f'{{{{ fileDirname }}}}/{checkpoint}',
    )


def _comment(text):
    return textwrap.fill(text, 79, initial_indent='# ', subsequent_indent='#   ')
