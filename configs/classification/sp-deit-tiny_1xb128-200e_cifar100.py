# SP-DeiT-Ti on CIFAR-100: 32 pixels in patches of 4.
_base_ = [
    '../_base_/models/sp-deit-small.py',
    'mmpretrain::_base_/datasets/cifar100_bs16.py',
    '../_base_/schedules/cifar_200e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(arch='deit-tiny', img_size=32, patch_size=4, drop_path_rate=0.1),
    head=dict(num_classes=100, in_channels=192),
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
