# The student of the digits without label maps: the yardstick of token labeling.
_base_ = [
    '../_base_/models/spvit-mini.py',
    '../_base_/datasets/digits_folder_bs64_24.py',
    '../_base_/schedules/digits_50e.py',
    '../_base_/default_runtime.py',
]

train_cfg = dict(max_epochs=20)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=5, max_keep_ckpts=1)
)
randomness = dict(seed=0)
