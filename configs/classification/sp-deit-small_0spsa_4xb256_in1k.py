# DeiT-S, the baseline of SP-DeiT-S: no prior, class token first.
_base_ = './sp-deit-small_4xb256_in1k.py'

model = dict(backbone=dict(num_spsa_layers=0))
