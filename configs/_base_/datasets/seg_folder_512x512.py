# Images and masks in folders of your own:
#
#   data/my_dataset/images/{train,val}/NAME.jpg
#   data/my_dataset/masks/{train,val}/NAME.png   one channel, pixel = class, 255 = none
_base_ = './seg_bs16_512x512.py'

common = dict(
    type='BaseSegDataset',
    data_root='data/my_dataset',
    metainfo=dict(classes=('background', 'object')),
    img_suffix='.jpg',
    seg_map_suffix='.png',
)
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
        **common,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'), **common
    )
)
test_dataloader = val_dataloader
