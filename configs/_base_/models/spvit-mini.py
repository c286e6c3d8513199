# A tiny SP-ViT for images of 24 x 24: 6 x 6 patches, 4 layers, the first 3 of them SP-SA.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SPViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=24,
        patch_size=4,
        num_spsa_layers=3,
        # Heads that look beside the query from the start, and a score that their
        # priors multiply: what so small a model learns fastest with, see
        # docs/studies.md. Leave both out for the start of the paper.
        prior=dict(type='MLPSpatialPrior', init='local'),
        attn_cfg=dict(init_score=2.0),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
