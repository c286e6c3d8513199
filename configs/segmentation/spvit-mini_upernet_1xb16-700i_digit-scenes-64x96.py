# A small SP-ViT with UPerNet on scenes of handwritten digits: no download, a few
# minutes on a laptop.
_base_ = [
    '../_base_/datasets/digit-scenes_bs16_64x96.py',
    '../_base_/seg_default_runtime.py',
]

norm_cfg = dict(type='BN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[55.0, 55.0, 55.0],
        std=[45.0, 45.0, 45.0],
        pad_val=0,
        seg_pad_val=255,
        size=(64, 96),
    ),
    backbone=dict(
        type='mmpretrain.SPViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=(64, 96),
        patch_size=8,
        stem=dict(type='ConvStem', stem_channels=48),
        with_peg=True,
        num_spsa_layers=3,
        out_type='featmap',
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(
        type='Feature2Pyramid',
        embed_dim=64,
        rescales=[4, 2, 1, 0.5],
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3),
        channels=32,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        # Nine of ten pixels are background, which is soon learned.
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[0.1] + [1.0] * 10),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=700),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=700, val_interval=350)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=350, max_keep_ckpts=2),
)
randomness = dict(seed=0)
