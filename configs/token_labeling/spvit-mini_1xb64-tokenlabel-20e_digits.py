# Token labeling and MixToken on the digits, with the label maps of the teacher of
# resnet-mini_1xb64-10e_digits.py. `make demo-tokenlabel` runs it all.
_base_ = './spvit-mini_1xb64-20e_digits.py'

model = dict(
    type='TokenLabelClassifier',
    backbone=dict(out_type='raw'),
    head=dict(_delete_=True, type='TokenLabelClsHead', num_classes=10, in_channels=64),
)

__types = dict(
    RandomResizedCrop='TokenLabelRandomResizedCrop', PackInputs='PackTokenLabelInputs'
)
train_pipeline = [
    dict(step, type=__types.get(step['type'], step['type']))
    for step in _base_.train_pipeline
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TokenLabelDataset',
        dataset=dict(type='CustomDataset', data_prefix=_base_.data_root + 'train'),
        label_root=_base_.data_root + 'token_labels',
        pipeline=train_pipeline,
    )
)
