# Fine-tunes SP-ViT-L at 384 pixels, batch 128 in four accumulated parts.
_base_ = './spvit-medium_8xb16-ft-30e_in1k-384px.py'

model = dict(
    backbone=dict(arch='spvit-large', drop_path_rate=0.3),
    head=dict(in_channels=768),
)

train_pipeline = [
    dict(step, num_policies=3) if step['type'] == 'RandAugment' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(accumulative_counts=4)

load_from = 'work_dirs/spvit-large_8xb100-300e_in1k/epoch_310.pth'
