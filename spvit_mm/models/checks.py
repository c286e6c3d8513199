"""What arguments must be, with one wording for all of them."""

import numbers

import numpy as np
from mmengine.utils import to_2tuple


def is_int(value):
    """Whether it is a whole number; True and False are taken for a mistake."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_int(name, value, low, high=None, note=''):
    """Return ``value`` as an int.

    Args:
        name (str): The argument.
        value (object): What came.
        low (int): The smallest value that is taken.
        high (int, optional): The largest. Defaults to None, no limit.
        note (str): Where the limits come from, for the error.

    Raises:
        ValueError: If it is no integer, or out of range.
    """
    if not is_int(value) or value < low or (high is not None and value > high):
        accepted = f'in {low}..{high}' if high is not None else f'of {low} or more'
        note = f' ({note})' if note else ''
        raise ValueError(
            f'`{name}` must be an integer {accepted}{note}, got {value!r}.'
        )
    return int(value)


def check_flags(**flags):
    """Raise a ValueError unless all are True or False: the text 'no' would be true."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f'`{name}` must be True or False, got {value!r}.')


def check_sides(name, value):
    """Return one side or two (h, w), in pixels, as two.

    Raises:
        ValueError: Unless they are positive integers.
    """
    sides = to_2tuple(value)
    if len(sides) != 2 or any(not is_int(side) or side < 1 for side in sides):
        raise ValueError(
            f'`{name}` must be a positive integer or two of them (h, w), in '
            f'pixels, got {value!r}.'
        )
    return sides


def check_choice(name, value, accepted):
    """Raise a ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f'`{name}` must be one of {accepted}, got {value!r}.')


def check_heads(embed_dims, num_heads):
    """Raise a ValueError unless the heads divide the embedding."""
    if num_heads < 1 or embed_dims % num_heads:
        raise ValueError(
            f'`embed_dims` must be divisible by `num_heads`, got '
            f'embed_dims={embed_dims} and num_heads={num_heads}.'
        )
