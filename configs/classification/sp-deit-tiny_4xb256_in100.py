# SP-DeiT-Ti on 100 classes of ImageNet, with DeiT's recipe of ImageNet-1k: a tenth of
# the images an epoch, so a tenth of the steps.
_base_ = [
    '../_base_/models/sp-deit-small.py',
    '../_base_/datasets/imagenet100_bs256_swin_224.py',
    '../_base_/schedules/imagenet_bs1024_deit_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(arch='deit-tiny'),
    head=dict(num_classes=100, in_channels=192),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
)
data_preprocessor = dict(num_classes=100)
