_base_ = './seg_bs16_lvvit_160k.py'

# Two underscores keep a name out of the config.
__warmup, __decay = _base_.param_scheduler
param_scheduler = [__warmup, dict(__decay, end=80000)]

train_cfg = dict(max_iters=80000, val_interval=8000)
