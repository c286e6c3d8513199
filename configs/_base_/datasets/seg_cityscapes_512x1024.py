_base_ = './seg_bs16_512x512.py'

crop_size = (512, 1024)

# Two underscores keep a name out of the config.
__changes = dict(
    RandomResize=dict(scale=(2048, 1024)),
    RandomCrop=dict(crop_size=crop_size),
    Resize=dict(scale=(2048, 1024)),
)
train_pipeline = [
    dict(step, **__changes.get(step['type'], {})) for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, **__changes.get(step['type'], {})) for step in _base_.test_pipeline
]

common = dict(type='CityscapesDataset', data_root='data/cityscapes')
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=train_pipeline,
        **common,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
        **common,
    )
)
test_dataloader = val_dataloader
