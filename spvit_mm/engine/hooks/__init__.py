from .checkpoint import AtomicCheckpointHook
from .cls_visualization import ClsVisualizationHook
from .data_check import DataCheckHook
from .load_report import LoadReport, LoadReportHook, load_whole_checkpoint
from .prior_visualization_hook import PriorVisualizationHook
from .random_state import RandomStateHook
from .seg_data_check import SegDataCheckHook

__all__ = [
    'AtomicCheckpointHook',
    'ClsVisualizationHook',
    'DataCheckHook',
    'LoadReport',
    'LoadReportHook',
    'PriorVisualizationHook',
    'RandomStateHook',
    'SegDataCheckHook',
    'load_whole_checkpoint',
]
