# The network of the position study on photographs: Imagenette at 128 pixels, trained on
# crops of 64 in patches of 8, so that it can be tested at other sizes with real detail.
# docs/studies.md has the protocol and says where the images come from.
_base_ = './spvit-mini_no-embed_1xb64-40e_cifar10-20k.py'

model = dict(backbone=dict(img_size=64, patch_size=8))

data_root = 'data/imagenette128/'
data_preprocessor = dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])

__light = _base_.train_pipeline[3]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    __light,
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), interpolation='bicubic'),
    dict(type='PackInputs'),
]
# Nine of every ten images; the others are for tuning a factor at each size. The ranges
# say how many images there must be.
__images = dict(
    type='CustomDataset',
    data_root=data_root,
    data_prefix='train',
    pipeline=train_pipeline,
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[dict(__images, indices=range(i, 9469, 10)) for i in range(9)],
    )
)
__tested = dict(
    data_root=data_root,
    data_prefix='val',
    indices=range(3925),
    pipeline=test_pipeline,
)
val_dataloader = dict(dataset=__tested)
test_dataloader = val_dataloader
# What of the dataset of `test_dataloader` changes, to test those others.
held_out = dict(data_prefix='train', indices=range(9, 9469, 10))

train_cfg = dict(max_epochs=60, val_interval=6)
