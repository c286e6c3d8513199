# SP-ViT-L with token labeling and MixToken, as released: 85.5 in the paper.
# 22 of 24 layers are SP-SA, as the paper says (the released code builds none).
_base_ = [
    '../_base_/models/spvit-large.py',
    '../_base_/datasets/imagenet_bs128_tokenlabel_224.py',
    '../_base_/schedules/imagenet_bs1024_lvvit_310e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='TokenLabelClassifier',
    backbone=dict(out_type='raw'),
    head=dict(
        _delete_=True,
        type='TokenLabelClsHead',
        num_classes=1000,
        in_channels=768,
    ),
)

train_pipeline = _base_.train_pipeline
train_pipeline[3]['num_policies'] = 3
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 224  # test crop 1.0
train_dataloader = dict(batch_size=100, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 6e-4,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
auto_scale_lr = dict(base_batch_size=800)
