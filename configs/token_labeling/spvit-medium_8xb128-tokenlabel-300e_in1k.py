# SP-ViT-M with token labeling and MixToken, as released: 84.9 in the paper.
_base_ = './spvit-small_8xb128-tokenlabel-300e_in1k.py'

model = dict(
    backbone=dict(arch='spvit-medium', drop_path_rate=0.2),
    head=dict(in_channels=512),
)

# test crop 1.0
test_pipeline = [
    dict(step, scale=224) if step['type'] == 'ResizeEdge' else step
    for step in _base_.test_pipeline
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
