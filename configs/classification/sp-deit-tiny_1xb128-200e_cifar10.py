# SP-DeiT-Ti on CIFAR-10: 32 pixels in patches of 4. mmpretrain's dataset class
# downloads to data/cifar10 when nothing is there.
_base_ = [
    '../_base_/models/sp-deit-small.py',
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    '../_base_/schedules/cifar_200e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(arch='deit-tiny', img_size=32, patch_size=4, drop_path_rate=0.1),
    head=dict(num_classes=10, in_channels=192),
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
