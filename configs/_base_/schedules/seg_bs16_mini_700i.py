# For the small model: a short warm-up, then half a cosine.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        custom_keys={
            # What other methods of position learn: frequencies, scores and distances.
            '.freqs': dict(decay_mult=0.0),
            '.score': dict(decay_mult=0.0),
            '.gate': dict(decay_mult=0.0),
            '.prior.log_': dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=700),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=700, val_interval=350)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
