"""What every other part may use: errors, files, checkpoints, figures, the ModelHub."""

from .checkpoint import (
    check_checkpoint_file,
    read_checkpoint,
    safe_loader,
    write_checkpoint,
)
from .errors import (
    CheckpointError,
    CorruptImageError,
    LabelMapError,
    UnsafeCheckpointError,
    UserError,
    describe_error,
)
from .figures import figure_to_image, new_figure, save_figure
from .files import (
    check_new_file,
    check_new_folder,
    check_not_source,
    whole_file,
    write_csv,
)
from .finite import first_not_finite
from .modules import reverses_channels, unwrap_model
from .progress import with_progress

__all__ = [
    'CheckpointError',
    'CorruptImageError',
    'LabelMapError',
    'UnsafeCheckpointError',
    'UserError',
    'check_checkpoint_file',
    'check_new_file',
    'check_new_folder',
    'check_not_source',
    'describe_error',
    'figure_to_image',
    'first_not_finite',
    'new_figure',
    'read_checkpoint',
    'reverses_channels',
    'safe_loader',
    'save_figure',
    'unwrap_model',
    'whole_file',
    'write_checkpoint',
    'with_progress',
    'write_csv',
]
