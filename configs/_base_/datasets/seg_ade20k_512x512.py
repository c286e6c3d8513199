_base_ = './seg_bs16_512x512.py'

common = dict(type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016')
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        **common,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
        **common,
    )
)
test_dataloader = val_dataloader
