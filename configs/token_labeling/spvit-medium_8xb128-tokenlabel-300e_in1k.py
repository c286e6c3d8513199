# SP-ViT-M with token labeling and MixToken, as released: 84.9 in the paper.
_base_ = [
    '../_base_/models/spvit-medium.py',
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
        in_channels=512,
    ),
)

test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 224  # test crop 1.0
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
