# Fine-tunes SP-ViT-L at 384 pixels with 24 x 24 token labels: 86.3 in the paper.
# The position embedding is resized on load.
_base_ = [
    '../_base_/models/spvit-large.py',
    '../_base_/datasets/imagenet_bs32_tokenlabel_384.py',
    '../_base_/schedules/imagenet_ft_30e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='TokenLabelClassifier',
    backbone=dict(img_size=384, out_type='raw'),
    head=dict(
        _delete_=True,
        type='TokenLabelClsHead',
        num_classes=1000,
        in_channels=768,
    ),
)

train_pipeline = _base_.train_pipeline
train_pipeline[3]['num_policies'] = 3
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 384  # test crop 1.0
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(accumulative_counts=4)
auto_scale_lr = dict(base_batch_size=128)

# Its state_dict holds the moving average of the training at 224.
load_from = 'work_dirs/spvit-large_8xb100-tokenlabel-300e_in1k/epoch_310.pth'
