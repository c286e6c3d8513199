# SP-ViT-S with LV-ViT's recipe, but without token labeling.
_base_ = [
    '../_base_/models/spvit-small.py',
    '../_base_/datasets/imagenet_bs128_lvvit_224.py',
    '../_base_/schedules/imagenet_bs1024_lvvit_310e.py',
    '../_base_/default_runtime.py',
]
