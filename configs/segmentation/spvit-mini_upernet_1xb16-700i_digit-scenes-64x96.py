# A small SP-ViT with UPerNet on scenes of handwritten digits: no download, a few
# minutes on a laptop.
_base_ = [
    '../_base_/models/upernet_spvit-mini.py',
    '../_base_/datasets/digit-scenes_bs16_64x96.py',
    '../_base_/seg_default_runtime.py',
    '../_base_/schedules/seg_bs16_mini_700i.py',
]

model = dict(
    decode_head=dict(
        num_classes=11,
        # Nine of ten pixels are background, which is soon learned.
        loss_decode=dict(class_weight=[0.1] + [1.0] * 10),
    ),
)

default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=350, max_keep_ckpts=2),
)
randomness = dict(seed=0)
