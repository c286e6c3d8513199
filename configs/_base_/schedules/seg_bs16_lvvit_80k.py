_base_ = './seg_bs16_lvvit_160k.py'

train_cfg = dict(max_iters=80000, val_interval=8000)
