_base_ = './spvit-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='spvit-medium', out_indices=(7, 11, 15, 19), drop_path_rate=0.2),
    neck=dict(embed_dim=512),
    decode_head=dict(in_channels=[512, 512, 512, 512]),
    auxiliary_head=dict(in_channels=512),
)
