# SP-DeiT-S with layer-wise learning-rate decay.
_base_ = './spvit-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='deit-small',
        num_spsa_layers=10,
        prior=dict(hidden_dims=32),
        out_indices=(2, 5, 8, 11),
    )
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    constructor='mmpretrain.BackboneLayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
