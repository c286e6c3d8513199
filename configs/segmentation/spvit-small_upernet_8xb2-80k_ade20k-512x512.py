_base_ = [
    '../_base_/models/upernet_spvit-small.py',
    '../_base_/datasets/seg_ade20k_512x512.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_lvvit_80k.py',
]

train_dataloader = dict(batch_size=2)
default_hooks = dict(checkpoint=dict(interval=8000))
