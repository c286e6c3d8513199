# LV-ViT's schedule: 300 epochs of cosine with 5 of warm-up, then 10 epochs of
# cool-down at the minimum.
_base_ = './adamw_cosine.py'

optim_wrapper = dict(optimizer=dict(lr=1.6e-3, eps=1e-8))

__warmup, __ = _base_.param_scheduler
param_scheduler = [
    dict(__warmup, start_factor=1e-6 / 1.6e-3),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]

train_cfg = dict(max_epochs=310)

auto_scale_lr = dict(base_batch_size=1024)

# Beta is momentum here: 1 - 0.99992.
custom_hooks = [dict(type='EMAHook', momentum=8e-5)]
