"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A file or its content is not a checkpoint that can be converted."""


class UnsafeCheckpointError(CheckpointError):
    """A file holds objects whose loading could run code."""
