_base_ = './adamw_cosine.py'

optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))

# Two underscores keep a name out of the config.
__warmup, __cosine = _base_.param_scheduler
param_scheduler = [dict(__warmup, end=10), dict(__cosine, begin=10)]

train_cfg = dict(max_epochs=200, val_interval=5)

auto_scale_lr = dict(base_batch_size=128)
