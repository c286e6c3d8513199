# ImageNet-1k at 384 pixels with label maps: the targets are 24 x 24.
_base_ = './imagenet_bs32_lvvit_384.py'

label_root = 'data/label_top5_train_nfnet'

train_pipeline = _base_.train_pipeline
train_pipeline[1]['type'] = 'TokenLabelRandomResizedCrop'
train_pipeline[2]['type'] = 'TokenLabelRandomFlip'
train_pipeline[5]['type'] = 'PackTokenLabelInputs'

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TokenLabelDataset',
        dataset=dict(type='ImageNet', data_root='data/imagenet', split='train'),
        label_root=label_root,
        pipeline=train_pipeline,
    )
)
