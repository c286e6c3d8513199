# Segmenter's mask transformer on the last layer, in place of neck and UPerNet.
_base_ = './spvit-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(out_indices=15),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='SegmenterMaskTransformerHead',
        in_channels=384,
        channels=384,
        num_classes=150,
        num_layers=2,
        num_heads=6,
        embed_dims=384,
        dropout_ratio=0.0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
