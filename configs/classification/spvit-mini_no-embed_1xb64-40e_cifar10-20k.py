# The network of the position study: no absolute embedding, so that position comes from
# attention alone, and 20,000 images of CIFAR-10. About half an hour on one core.
# `benchmarks/study.py positions` changes the prior and `attn_cfg`; docs/studies.md has
# the protocol and says where the images come from.
_base_ = [
    '../_base_/models/spvit-mini.py',
    '../_base_/datasets/cifar10_folder_5k_bs64_32.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        img_size=32,
        pos_embed=None,
        # Without biases `init_score` is the same scalar for all scores, so product
        # and sum can start alike.
        qkv_bias=False,
        prior=dict(_delete_=True, type='MLPSpatialPrior'),
        attn_cfg=dict(_delete_=True),
    )
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=1,
        total_level=10,
        magnitude_level=5,
        magnitude_std=0.5,
    ),
    dict(type='PackInputs'),
]
__images = dict(_base_.train_dataloader.dataset, pipeline=train_pipeline)
# Two of every five images, 2,000 of each class, as ranges: a list would be 20,000
# lines of the log.
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(__images, indices=range(0, 50000, 5)),
            dict(__images, indices=range(1, 50000, 5)),
        ],
    )
)
__tested = dict(indices=range(10000))
val_dataloader = dict(dataset=__tested)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=40, val_interval=4)
# Only to go on after a crash.
default_hooks = dict(
    checkpoint=dict(interval=2, max_keep_ckpts=1), logger=dict(interval=100)
)
randomness = dict(seed=0)
