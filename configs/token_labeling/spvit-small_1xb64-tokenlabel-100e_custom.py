# Token labeling on your own images, one folder a class:
# data/custom/{train,val}/<class>/*.jpg, and their label maps in
# data/custom/token_labels, made by a teacher that was fine-tuned on them, see
# tools/dataset_converters/generate_token_labels.py.
_base_ = './spvit-small_8xb128-tokenlabel-300e_in1k.py'

num_classes = 2
extensions = [
    *('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif'),
    *('.tiff', '.webp', '.jp2'),
]

model = dict(head=dict(num_classes=num_classes))
data_preprocessor = dict(num_classes=num_classes)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        dataset=dict(
            _delete_=True,
            type='CustomDataset',
            data_prefix='data/custom/train',
            extensions=extensions,
        ),
        label_root='data/custom/token_labels',
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_prefix='data/custom/val',
        extensions=extensions,
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator

__warmup, __cosine = _base_.param_scheduler
param_scheduler = [dict(__warmup, start_factor=1e-3), dict(__cosine, end=100)]
train_cfg = dict(max_epochs=100)
auto_scale_lr = dict(enable=True)

# The average over 1 / 8e-5 iterations would take many epochs of a small folder.
custom_hooks = [dict(type='EMAHook', momentum=1e-3)]

# Weights to start from, from tools/model_converters/convert.py.
load_from = None
