# ImageNet-1k with the label maps that LV-ViT's authors publish, or those of
# tools/dataset_converters/generate_token_labels.py. Where mmpretrain's
# augmentation is not the published one: the noise of erased pixels is cut to
# 0..255, since it comes before normalization.
_base_ = './imagenet_bs128_lvvit_224.py'

label_root = 'data/label_top5_train_nfnet'

# Two underscores keep a name out of the config.
__types = dict(
    RandomResizedCrop='TokenLabelRandomResizedCrop',
    RandomFlip='TokenLabelRandomFlip',
    PackInputs='PackTokenLabelInputs',
)
train_pipeline = [
    dict(step, type=__types.get(step['type'], step['type']))
    for step in _base_.train_pipeline
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TokenLabelDataset',
        dataset=dict(type='ImageNet', data_root='data/imagenet', split='train'),
        label_root=label_root,
        pipeline=train_pipeline,
    )
)
