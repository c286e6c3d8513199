from .complexity import attention_flops, register_flop_counter
from .data_checks import check_dataset, guard_images
from .errors import CorruptImageError, UserError
from .hooks import (
    AtomicCheckpointHook,
    DataCheckHook,
    LoadReport,
    LoadReportHook,
    PriorVisualizationHook,
    RandomStateHook,
    load_whole_checkpoint,
)
from .optim import BFloat16OptimWrapper

__all__ = [
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'CorruptImageError',
    'DataCheckHook',
    'LoadReport',
    'LoadReportHook',
    'PriorVisualizationHook',
    'RandomStateHook',
    'UserError',
    'attention_flops',
    'check_dataset',
    'guard_images',
    'load_whole_checkpoint',
    'register_flop_counter',
]
