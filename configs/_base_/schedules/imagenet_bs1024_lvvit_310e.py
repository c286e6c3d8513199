# LV-ViT's schedule: 300 epochs of cosine with 5 of warm-up, then 10 epochs of
# cool-down at the minimum. Weight decay on matrices only (the prior's W1 and w2
# included), not on biases, norms, position embedding and class token.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1.6e-3, weight_decay=0.05, eps=1e-8),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
        },
    ),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 1.6e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]

train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=1024)

# Beta is momentum here: 1 - 0.99992.
custom_hooks = [dict(type='EMAHook', momentum=8e-5)]
