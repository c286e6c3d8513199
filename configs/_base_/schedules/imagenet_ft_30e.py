# Fine-tuning at a higher resolution: constant learning rate.
_base_ = './imagenet_bs1024_lvvit_310e.py'

optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=256)
