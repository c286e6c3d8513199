_base_ = './cifar_200e.py'

optim_wrapper = dict(optimizer=dict(lr=2e-3))

__warmup, __cosine = _base_.param_scheduler
param_scheduler = [dict(__warmup, end=3), dict(__cosine, begin=3)]

train_cfg = dict(max_epochs=50)
auto_scale_lr = dict(base_batch_size=64)
