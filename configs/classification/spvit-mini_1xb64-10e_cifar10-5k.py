# The SP-ViT of the digits on 5,000 images of CIFAR-10: two or three minutes on one core.
_base_ = [
    '../_base_/models/spvit-mini.py',
    '../_base_/datasets/cifar10_folder_5k_bs64_32.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(img_size=32))

train_cfg = dict(max_epochs=10)
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=1))
randomness = dict(seed=0)
