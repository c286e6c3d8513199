# SP-ViT-L with token labeling and MixToken, as released: 85.5 in the paper.
# 22 of 24 layers are SP-SA, as the paper says (the released code builds none).
_base_ = './spvit-medium_8xb128-tokenlabel-300e_in1k.py'

model = dict(
    backbone=dict(arch='spvit-large', drop_path_rate=0.3),
    head=dict(in_channels=768),
)

train_pipeline = [
    dict(step, num_policies=3) if step['type'] == 'RandAugment' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=100, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(lr=6e-4))
__warmup, __cosine = _base_.param_scheduler
param_scheduler = [dict(__warmup, start_factor=1e-6 / 6e-4), __cosine]
auto_scale_lr = dict(base_batch_size=800)
