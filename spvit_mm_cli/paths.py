"""What is wrong with a path."""

import os
import os.path as osp
from glob import escape, glob
from typing import Optional

# What mmengine reads as a config.
CONFIG_SUFFIXES = ('.py', '.yaml', '.yml', '.json')


def config_problem(path: str) -> Optional[str]:
    """Why a path is no config file, in words; None for a file that may be one.

    mmengine says of a folder that it does not exist, and of no name likewise.
    """
    place = osp.expanduser(str(path))
    if not place:
        reason = 'its name is empty'
    elif osp.isdir(place):
        reason = 'it is a folder. Give one of its .py files'
    elif not osp.isfile(place):
        reason = f'it does not exist (seen from {os.getcwd()})'
    elif osp.splitext(place)[1] not in CONFIG_SUFFIXES:
        reason = f'it must end in {", ".join(CONFIG_SUFFIXES)}'
    else:
        return None
    return f'The config {path or repr(path)} cannot be read: {reason}.'


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
