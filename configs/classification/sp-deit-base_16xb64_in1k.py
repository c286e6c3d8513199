# SP-DeiT-B, with the drop path and the moving average of mmpretrain's DeiT-B.
_base_ = './sp-deit-small_4xb256_in1k.py'

model = dict(
    backbone=dict(arch='deit-base', drop_path_rate=0.1), head=dict(in_channels=768)
)

train_dataloader = dict(batch_size=64)

custom_hooks = [dict(type='EMAHook', momentum=4e-5)]
