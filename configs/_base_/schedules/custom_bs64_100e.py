# DeiT's recipe for a batch of 64, 100 epochs and a short warm-up.
_base_ = './adamw_cosine.py'

optim_wrapper = dict(optimizer=dict(lr=1e-3 * 64 / 1024), clip_grad=dict(max_norm=5.0))

__warmup, __cosine = _base_.param_scheduler
param_scheduler = [__warmup, dict(__cosine, eta_min=1e-6)]

train_cfg = dict(max_epochs=100)

auto_scale_lr = dict(base_batch_size=64)
