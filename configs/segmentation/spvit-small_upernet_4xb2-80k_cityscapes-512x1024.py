# Crops of 512 x 1024 pixels: a grid of 32 x 64 patches.
_base_ = [
    '../_base_/models/upernet_spvit-small.py',
    '../_base_/datasets/seg_cityscapes_512x1024.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_lvvit_80k.py',
]

crop_size = (512, 1024)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(crop_size=crop_size, stride=(341, 683)),
)

train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=8000))
