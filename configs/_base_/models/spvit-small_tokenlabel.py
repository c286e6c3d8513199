# SP-ViT-S with a head on every patch token beside that on the class token, and MixToken.
_base_ = './spvit-small.py'

model = dict(
    type='TokenLabelClassifier',
    backbone=dict(out_type='raw'),
    head=dict(
        _delete_=True, type='TokenLabelClsHead', num_classes=1000, in_channels=384
    ),
)
