# Token labeling and MixToken on the digits, with the label maps of the teacher of
# resnet-mini_1xb64-10e_digits.py. `make demo-tokenlabel` runs it all.
_base_ = './spvit-mini_1xb64-20e_digits.py'

model = dict(
    backbone=dict(out_type='raw'),
    head=dict(dense_weight=1.0),
    mix_token_alpha=1.0,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1]['type'] = 'TokenLabelRandomResizedCrop'
train_pipeline[2]['type'] = 'PackTokenLabelInputs'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='TokenLabelDataset',
        dataset=dict(type='CustomDataset', data_prefix={{_base_.data_root}} + 'train'),
        label_root={{_base_.data_root}} + 'token_labels',
        pipeline=train_pipeline,
    )
)
