# A tiny SP-ViT for images of 24 x 24: 6 x 6 patches, 4 layers, the first 3 of them SP-SA.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SPViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=24,
        patch_size=4,
        num_spsa_layers=3,
        # So small a model learns its priors much faster so (docs/studies.md).
        attn_cfg=dict(init_score=1.0),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
