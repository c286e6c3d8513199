# 22 of 24 layers are SP-SA, as in the paper. The released L has none, which is
# num_spsa_layers=0 and cls_token_layer=22 here.
_base_ = './spvit-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='spvit-large', out_indices=(8, 13, 18, 23), drop_path_rate=0.3),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
