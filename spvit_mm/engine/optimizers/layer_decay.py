"""Layer-wise learning-rate decay for models of any OpenMMLab package."""

from functools import partial

from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor
from mmpretrain.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BackboneLayerDecayOptimWrapperConstructor(
    LearningRateDecayOptimWrapperConstructor
):
    """mmpretrain's layer-wise decay, where only the backbone knows its depth.

    mmpretrain asks the whole model for ``get_layer_depth``, which segmentors
    and detectors lack; mmsegmentation's own constructor takes only backbones
    of certain names. This one asks ``model.backbone``. Neck and heads have the
    last depth and so the full learning rate:

        lr of depth l = lr * layer_decay_rate ** (num_depths - 1 - l)

    It is configured as mmpretrain's. Inside an mmsegmentation config:

    .. code:: python

        optim_wrapper = dict(
            optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
            constructor='mmpretrain.BackboneLayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.9))

    Raises:
        ValueError: If neither the model nor its backbone has
            ``get_layer_depth``.
    """

    def add_params(self, params, module, prefix='', get_layer_depth=None, **kwargs):
        """Add the parameters of ``module`` to ``params``, as mmpretrain's."""
        if get_layer_depth is None and not hasattr(module, 'get_layer_depth'):
            backbone = getattr(module, 'backbone', None)
            if not hasattr(backbone, 'get_layer_depth'):
                raise ValueError(
                    'Layer-wise learning-rate decay needs `get_layer_depth` on the '
                    f'model or its `backbone`, but {type(module).__name__} with the '
                    f'backbone {type(backbone).__name__} has none. Take a backbone '
                    "that has one, such as 'mmpretrain.SPViT', or leave out the "
                    '`constructor` of `optim_wrapper`.'
                )
            get_layer_depth = partial(backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
