# SP-ViT-S with token labeling and MixToken, as released: 83.9 in the paper.
_base_ = [
    '../_base_/models/spvit-small_tokenlabel.py',
    '../_base_/datasets/imagenet_bs128_tokenlabel_224.py',
    '../_base_/schedules/imagenet_bs1024_lvvit_310e.py',
    '../_base_/default_runtime.py',
]
