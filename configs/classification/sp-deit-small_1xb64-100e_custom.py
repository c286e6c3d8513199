# Your own images, one folder a class: data/custom/{train,val}/<class>/*.jpg
_base_ = './sp-deit-small_4xb256_in1k.py'

num_classes = 2
train_data, val_data = (
    dict(_delete_=True, type='CustomDataset', data_prefix=f'data/custom/{split}')
    for split in ('train', 'val')
)

model = dict(head=dict(num_classes=num_classes))
data_preprocessor = dict(num_classes=num_classes)
train_dataloader = dict(
    batch_size=64, dataset=dict(**train_data, pipeline=_base_.train_pipeline)
)
val_dataloader = dict(dataset=dict(**val_data, pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=100)
auto_scale_lr = dict(enable=True)
