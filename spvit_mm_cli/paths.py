"""What is wrong with a path."""

import os
import os.path as osp
from glob import escape, glob
from typing import Optional


def config_problem(path: str) -> Optional[str]:
    """Why a path is no config file, in words; None for a file that can be opened."""
    try:
        open(path).close()
    except OSError as error:
        return f'The config {path} cannot be read: {type(error).__name__}: {error}'
    return None


def checkpoint_problem(path: str) -> Optional[str]:
    """Why a path is no file, in words; None for a file and for an address.

    Addresses (``https://...``) are left to mmengine.
    """
    if '://' in path:
        return None
    path = osp.expanduser(path)
    if osp.isdir(path):
        inside = sorted(glob(osp.join(escape(path), '*.pth')))
        return f'The checkpoint {path} is a folder. Give a file' + (
            f': {", ".join(inside[:5])}.' if inside else '; it holds no .pth file.'
        )
    if not osp.isfile(path):
        return f'The checkpoint {path} does not exist (seen from {os.getcwd()}).'
    return None
