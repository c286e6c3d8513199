# SP-ViT-M with LV-ViT's recipe, but without token labeling. Test crop 1.0.
_base_ = [
    '../_base_/models/spvit-medium.py',
    '../_base_/datasets/imagenet_bs128_lvvit_224.py',
    '../_base_/schedules/imagenet_bs1024_lvvit_310e.py',
    '../_base_/default_runtime.py',
]

test_pipeline = [
    dict(step, scale=224) if step['type'] == 'ResizeEdge' else step
    for step in _base_.test_pipeline
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
