# Pascal VOC 2012, trained on its own masks and those of SBD.
_base_ = './seg_bs16_512x512.py'

voc = dict(type='PascalVOCDataset', data_root='data/VOCdevkit/VOC2012')
segmentation = 'ImageSets/Segmentation'
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassAug'),
        ann_file=f'{segmentation}/trainaug.txt',
        **voc,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file=f'{segmentation}/val.txt',
        **voc,
    )
)
test_dataloader = val_dataloader
