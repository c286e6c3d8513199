# A small SP-ViT with UPerNet on images and masks of your own, in crops of 64 x 96
# pixels: a look at a folder before a long training. See docs/segmentation.md.
_base_ = [
    '../_base_/models/upernet_spvit-mini.py',
    '../_base_/datasets/seg_folder_512x512.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_mini_700i.py',
]

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    # As many as metainfo has classes.
    decode_head=dict(num_classes=2),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 96)),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

# The crops are tiny: workers would only cost time.
__workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=16, dataset=dict(pipeline=train_pipeline), **__workers
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline), **__workers)
test_dataloader = val_dataloader

__warmup, __cosine = _base_.param_scheduler
param_scheduler = [__warmup, dict(__cosine, end=200)]
train_cfg = dict(max_iters=200, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=100))
randomness = dict(seed=0)
