# A small SP-ViT on scikit-learn's handwritten digits: no download, no files,
# about a minute on a laptop.
_base_ = [
    '../_base_/datasets/digits_bs64_24.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SPViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=24,
        patch_size=4,
        num_spsa_layers=3,
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=5, max_keep_ckpts=2),
)
randomness = dict(seed=0)
