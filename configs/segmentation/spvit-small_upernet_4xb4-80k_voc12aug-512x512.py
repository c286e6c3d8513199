_base_ = [
    '../_base_/models/upernet_spvit-small.py',
    '../_base_/datasets/seg_voc12aug_512x512.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_lvvit_80k.py',
]

model = dict(decode_head=dict(num_classes=21), auxiliary_head=dict(num_classes=21))

train_dataloader = dict(batch_size=4)
default_hooks = dict(checkpoint=dict(interval=8000))
