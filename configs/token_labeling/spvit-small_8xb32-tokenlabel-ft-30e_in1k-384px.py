# Fine-tunes SP-ViT-S at 384 pixels with 24 x 24 token labels: 85.1 in the paper.
# The position embedding is resized on load.
_base_ = [
    '../_base_/models/spvit-small_tokenlabel.py',
    '../_base_/datasets/imagenet_bs32_tokenlabel_384.py',
    '../_base_/schedules/imagenet_ft_30e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(img_size=384))

# Its state_dict holds the moving average of the training at 224.
load_from = 'work_dirs/spvit-small_8xb128-tokenlabel-300e_in1k/epoch_310.pth'
