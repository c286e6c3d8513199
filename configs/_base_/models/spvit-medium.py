_base_ = './spvit-small.py'

model = dict(
    backbone=dict(arch='spvit-medium', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
