"""Types of options: what cannot be meant ends the command while it reads its options."""

import argparse
import math
from collections.abc import Callable
from typing import Optional


def number(
    least: float,
    most: Optional[float] = None,
    kind: type = int,
    above: bool = False,
) -> Callable[[str], float]:
    """A number of an option, in a range.

    Args:
        least (float): The smallest that is accepted.
        most (float, optional): The largest one. Defaults to None: any finite number.
        kind (type): int or float. Defaults to int.
        above (bool): Whether ``least`` itself is not accepted. Defaults to False.

    Returns:
        callable: For ``type=`` of argparse's add_argument.
    """
    what = 'whole numbers' if kind is int else 'numbers'
    what += f' above {least}' if above else f' from {least} on' if most is None else ''
    if most is not None:
        what += f' up to {most}' if above else f' from {least} to {most}'

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        small = not value > least if above else not value >= least
        if small or not value < math.inf or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f'takes {what}, got {text!r}')
        return value

    return parse
