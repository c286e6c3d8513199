"""How far a long loop has come."""

import sys

from mmengine.utils import track_iter_progress


def with_progress(items):
    """The items of a loop, with a bar on stderr that says how long it still takes.

    Args:
        items (Sequence | DataLoader): What has a length; a single item has no bar.

    Returns:
        Iterable: The items.
    """
    count = len(items)
    return track_iter_progress((items, count), file=sys.stderr) if count > 1 else items
