# ImageNet-1k at 384 pixels for fine-tuning: the augmentation of the training at
# 224, test crop 0.9.
_base_ = './imagenet_bs128_lvvit_224.py'

# Two underscores keep a name out of the config.
__changes = dict(
    RandomResizedCrop=dict(scale=384),
    ResizeEdge=dict(scale=426),  # 384 / 0.9
    CenterCrop=dict(crop_size=384),
)
train_pipeline = [
    dict(step, **__changes.get(step['type'], {})) for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, **__changes.get(step['type'], {})) for step in _base_.test_pipeline
]

train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
