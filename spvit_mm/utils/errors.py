"""The mistakes of users, with one root."""


class UserError(ValueError):
    """A mistake that the user can mend, told in words for the user.

    The command lines print its message alone and exit with code 2.
    """


class CorruptImageError(UserError):
    """An image file that cannot be read."""


class CheckpointError(UserError):
    """A file or its content is no checkpoint that can be used."""


class UnsafeCheckpointError(CheckpointError):
    """A file holds objects whose loading could run code."""


class LabelMapError(UserError):
    """A label map of token labeling that is missing, broken or of other classes."""


def describe_error(error: Exception) -> str:
    """The text of an error, without the quotes that a KeyError puts around it.

    The first argument alone would not do: that of an OSError is its number.
    """
    keyed = isinstance(error, KeyError) and error.args
    return str(error.args[0] if keyed else error).strip()
