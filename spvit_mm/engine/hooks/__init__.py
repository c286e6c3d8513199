from .checkpoint import AtomicCheckpointHook
from .cls_visualization import ClsVisualizationHook
from .data_check import DataCheckHook
from .finite import FiniteHook
from .load_report import LoadReportHook
from .prior_visualization_hook import PriorVisualizationHook
from .random_state import RandomStateHook
from .resume_report import ResumeReportHook

__all__ = [
    'AtomicCheckpointHook',
    'ClsVisualizationHook',
    'DataCheckHook',
    'FiniteHook',
    'LoadReportHook',
    'PriorVisualizationHook',
    'RandomStateHook',
    'ResumeReportHook',
]
