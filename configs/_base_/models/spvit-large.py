_base_ = './spvit-small.py'

model = dict(
    backbone=dict(arch='spvit-large', drop_path_rate=0.3),
    head=dict(in_channels=768),
)
