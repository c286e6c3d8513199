# UPerNet on a tiny SP-ViT: 8 x 12 patches of 8 pixels, 4 layers, the first 3 of them
# SP-SA. `num_classes` is to be added.
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
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
