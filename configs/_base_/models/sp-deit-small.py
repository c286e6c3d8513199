# DeiT-S whose first 10 of 12 layers attend with spatial priors of hidden width
# 32; the class token joins after them.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SPViT',
        arch='deit-small',
        img_size=224,
        patch_size=16,
        num_spsa_layers=10,
        prior=dict(type='MLPSpatialPrior', hidden_dims=32),
    ),
    neck=None,
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=1000,
        in_channels=384,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    init_cfg=[
        dict(type='TruncNormal', layer='Linear', std=0.02),
        dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
    ],
)
