# Fine-tunes DeiT weights on your own images, one folder a class:
# data/custom/{train,val}/<class>/*.jpg, with a learning rate that decays from the
# last layer to the first.
_base_ = './sp-deit-small_1xb64-100e_custom.py'

model = dict(
    backbone=dict(
        # Outputs equal DeiT's at the start: neutral priors, class token first.
        cls_token_layer=0,
        # True: only the spatial priors and the head learn.
        freeze_all_but_priors=False,
    ),
)

# mmpretrain's own checkpoint of DeiT-S, or one that was converted by
# tools/model_converters/convert.py. The head, of other classes, starts anew.
load_from = 'checkpoints/deit-small_in1k.pth'

optim_wrapper = dict(
    constructor='LearningRateDecayOptimWrapperConstructor',
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(layer_decay_rate=0.75),
)
__warmup, __cosine = _base_.param_scheduler
param_scheduler = [__warmup, dict(__cosine, end=50)]
train_cfg = dict(max_epochs=50)
