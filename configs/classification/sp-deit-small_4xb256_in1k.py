# SP-DeiT-S: mmpretrain's DeiT-S recipe, with 10 of 12 layers SP-SA.
_base_ = [
    '../_base_/models/sp-deit-small.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../_base_/schedules/imagenet_bs1024_deit_300e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    )
)

train_dataloader = dict(batch_size=256)
