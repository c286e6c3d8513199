# ImageNet-1k with the label maps that LV-ViT's authors publish, or those of
# tools/dataset_converters/generate_token_labels.py. Where mmpretrain's
# augmentation is not the published one: the noise of erased pixels is cut to
# 0..255, since it comes before normalization.
_base_ = './imagenet_bs128_lvvit_224.py'

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
