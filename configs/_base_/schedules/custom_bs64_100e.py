# DeiT's recipe for a batch of 64 and 100 epochs.
_base_ = 'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py'

optim_wrapper = dict(
    optimizer=dict(lr=1e-3 * 64 / 1024),
    paramwise_cfg=dict(
        custom_keys={
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
        }
    ),
    clip_grad=dict(max_norm=5.0),
)
train_cfg = dict(max_epochs=100)
auto_scale_lr = dict(base_batch_size=64)
