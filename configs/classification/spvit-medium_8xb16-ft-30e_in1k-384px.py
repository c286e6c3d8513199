# Fine-tunes SP-ViT-M at 384 pixels, batch 128, test crop 1.0.
_base_ = [
    '../_base_/models/spvit-medium.py',
    '../_base_/datasets/imagenet_bs32_lvvit_384.py',
    '../_base_/schedules/imagenet_ft_30e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(img_size=384))

test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 384
train_dataloader = dict(batch_size=16)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=128)

load_from = 'work_dirs/spvit-medium_8xb128-300e_in1k/epoch_310.pth'
