_base_ = [
    '../_base_/models/upernet_spvit-small.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_lvvit_80k.py',
]

train_dataloader = dict(batch_size=2)
