# SP-ViT-L as the paper means it, with 22 of 24 layers SP-SA (the released code
# builds none of them), with LV-ViT's recipe, but without token labeling: three
# augmentations an image, batch 800, test crop 1.0.
_base_ = [
    '../_base_/models/spvit-large.py',
    '../_base_/datasets/imagenet_bs128_lvvit_224.py',
    '../_base_/schedules/imagenet_bs1024_lvvit_310e.py',
    '../_base_/default_runtime.py',
]

train_pipeline = _base_.train_pipeline
train_pipeline[3]['num_policies'] = 3
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 224
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
