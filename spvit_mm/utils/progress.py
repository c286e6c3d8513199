"""How far a long loop has come."""

import sys

from mmengine.utils import track_iter_progress


def with_progress(items, count=None):
    """The items of a loop, with a bar on stderr that says how long it still takes.

    Args:
        items (Iterable): What is looped over; a single item has no bar.
        count (int, optional): How many they are. Defaults to None: their length.

    Returns:
        Iterable: The items.
    """
    count = len(items) if count is None else count
    return track_iter_progress((items, count), file=sys.stderr) if count > 1 else items
