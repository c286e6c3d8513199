"""Writing files that are there as a whole or not at all."""

import os
import os.path as osp
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


def check_new_file(path: str, suffixes: tuple, force: bool = False) -> str:
    """Check, before any work starts, that a file can be written to ``path``.

    Args:
        path (str): The path.
        suffixes (tuple[str]): Endings that it may have.
        force (bool): Whether a file that is there may be replaced. Defaults to False.

    Returns:
        str: The path, ``~`` expanded.

    Raises:
        UserError: If it ends otherwise, is a folder, or is there without ``force``.
    """
    path = osp.expanduser(path)
    if osp.isdir(path):
        raise UserError(f'{path} is a folder. Give the name of a file to write.')
    if osp.splitext(path)[1] not in suffixes:
        raise UserError(f'{path} must end in {" or ".join(suffixes)}.')
    if osp.exists(path) and not force:
        raise UserError(
            f'{path} exists. Give another name, or --force to replace the file.'
        )
    return path


def prepare_picture(path: str, suffixes: tuple = ('.png',)) -> str:
    """Check, before any work starts, the name of a picture, and make its folder.

    A picture of an earlier call is replaced.

    Args:
        path (str): The path.
        suffixes (tuple[str]): Endings that it may have. Defaults to ('.png',).

    Returns:
        str: The path, ``~`` expanded.

    Raises:
        UserError: If it ends otherwise, is a folder, or its folder cannot be made.
    """
    path = check_new_file(path, suffixes, force=True)
    folder = osp.dirname(osp.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'The folder {folder} cannot be made: {error}.') from error
    return path


def make_writable(folder: str, what: str) -> None:
    """Make a folder, if there is none, and see that files can be written to it.

    Args:
        folder (str): The folder.
        what (str): What it is, for the message, such as 'The work dir'.

    Raises:
        UserError: If it cannot be made, or nothing can be written to it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'{what} {folder} cannot be written to: {error.strerror}.'
        ) from error


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A name beside ``path`` to write to; renamed to ``path`` when all went well."""
    folder, name = osp.split(osp.abspath(path))
    os.makedirs(folder, exist_ok=True)
    partial = osp.join(folder, f'.{os.getpid()}.partial.{name}')
    try:
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if osp.exists(partial):
            os.remove(partial)
