# Your own images and masks; see docs/segmentation.md.
_base_ = [
    '../_base_/models/upernet_spvit-small.py',
    '../_base_/datasets/seg_folder_512x512.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_lvvit_160k.py',
]

# As many as metainfo has classes.
model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2))

__warmup, __decay = _base_.param_scheduler
param_scheduler = [__warmup, dict(__decay, end=20000)]
train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
