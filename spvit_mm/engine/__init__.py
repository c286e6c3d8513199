from ..utils import CorruptImageError, UserError
from .data_checks import check_dataset, guard_images
from .hooks import (
    AtomicCheckpointHook,
    ClsVisualizationHook,
    DataCheckHook,
    LoadReport,
    LoadReportHook,
    PriorVisualizationHook,
    RandomStateHook,
    SegDataCheckHook,
    load_whole_checkpoint,
)
from .optim import BFloat16OptimWrapper
from .optimizers import BackboneLayerDecayOptimWrapperConstructor
from .seg_checks import check_seg_dataset

__all__ = [
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'BackboneLayerDecayOptimWrapperConstructor',
    'ClsVisualizationHook',
    'CorruptImageError',
    'DataCheckHook',
    'LoadReport',
    'LoadReportHook',
    'PriorVisualizationHook',
    'RandomStateHook',
    'SegDataCheckHook',
    'UserError',
    'check_dataset',
    'check_seg_dataset',
    'guard_images',
    'load_whole_checkpoint',
]
