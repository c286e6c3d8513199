# The student of the digits without label maps: the yardstick of token labeling.
_base_ = [
    '../_base_/datasets/digits_folder_bs64_24.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='TokenLabelClassifier',
    backbone=dict(
        type='SPViT',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=24,
        patch_size=4,
        num_spsa_layers=3,
        out_type='cls_token',
    ),
    head=dict(type='TokenLabelClsHead', num_classes=10, in_channels=64, dense_weight=0),
    mix_token_alpha=0,
)

train_cfg = dict(max_epochs=20)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=5, max_keep_ckpts=1)
)
randomness = dict(seed=0)
