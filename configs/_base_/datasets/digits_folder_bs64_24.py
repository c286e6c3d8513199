# The digits as image files, one folder a class, as `make demo-tokenlabel` writes
# them: 8 x 8 pixels shown at 24 x 24.
_base_ = './digits_bs64_24.py'

data_root = 'data/digits/'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop',
        scale=24,
        crop_ratio_range=(0.6, 1.0),
        interpolation='bicubic',
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(24, 24), interpolation='bicubic'),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix=data_root + 'train',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix=data_root + 'test',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
