# A small SP-ViT on scikit-learn's handwritten digits: no download, no files,
# about a minute on a laptop.
_base_ = [
    '../_base_/models/spvit-mini.py',
    '../_base_/datasets/digits_bs64_24.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=5, max_keep_ckpts=2),
)
randomness = dict(seed=0)
