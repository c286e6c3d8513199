# The shape of ConViT-S: width 432, 9 heads of 48.
_base_ = './sp-deit-small_4xb256_in1k.py'

model = dict(backbone=dict(arch='deit-small-9h'), head=dict(in_channels=432))
