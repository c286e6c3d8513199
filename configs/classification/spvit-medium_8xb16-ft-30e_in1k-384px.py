# Fine-tunes SP-ViT-M at 384 pixels, batch 128, test crop 1.0.
_base_ = './spvit-small_8xb32-ft-30e_in1k-384px.py'

model = dict(
    backbone=dict(arch='spvit-medium', drop_path_rate=0.2),
    head=dict(in_channels=512),
)

test_pipeline = [
    dict(step, scale=384) if step['type'] == 'ResizeEdge' else step
    for step in _base_.test_pipeline
]
train_dataloader = dict(batch_size=16)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=128)

load_from = 'work_dirs/spvit-medium_8xb128-300e_in1k/epoch_310.pth'
