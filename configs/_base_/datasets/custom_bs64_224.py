# A folder of one's own images, one subfolder a class, with ImageNet's pipelines.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

# CustomDataset's own are the first seven. A training says how many files it leaves out.
extensions = [
    *('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif'),
    *('.tiff', '.webp', '.jp2'),
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix='data/custom/train',
        extensions=extensions,
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix='data/custom/val',
        extensions=extensions,
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator
