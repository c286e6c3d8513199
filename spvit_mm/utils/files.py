"""Writing files that are there as a whole or not at all."""

import csv
import errno
import os
import os.path as osp
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Optional

from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


def check_new_folder(path: str) -> str:
    """Check, before any work starts, that files can be written to a folder.

    Nothing is made or left: what is tried is the folder or, if it is not there yet,
    the first one above it that is. Permissions alone would not do: the administrator
    has them all, on read-only disks as well.

    Args:
        path (str): The folder.

    Returns:
        str: The path, ``~`` expanded.

    Raises:
        UserError: If it has no name, is a file, or cannot be written to.
    """
    path = osp.expanduser(str(path))
    if not path:
        raise UserError('The name of the folder to write to is empty.')
    there = osp.abspath(path)
    while not osp.lexists(there):
        there = osp.dirname(there)
    if not osp.isdir(there):
        raise UserError(f'{path} cannot be written to: {there} is not a folder.')
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f'Nothing can be written to the folder {path}: {_reason(error)}.'
        ) from error
    return path


def check_new_file(
    path: str, suffixes: Optional[tuple] = None, force: bool = False
) -> str:
    """Check, before any work starts, that a file can be written to ``path``.

    Args:
        path (str): The path.
        suffixes (tuple[str], optional): Endings that it may have. Defaults to None:
            any.
        force (bool): Whether a file that is there may be replaced. Defaults to False.

    Returns:
        str: The path, ``~`` expanded.

    Raises:
        UserError: If it has no name, ends otherwise, is a folder, is there without
            ``force``, or its folder cannot be written to.
    """
    path = osp.expanduser(str(path))
    if not path:
        raise UserError('The name of the file to write is empty.')
    if osp.isdir(path):
        raise UserError(f'{path} is a folder. Give the name of a file to write.')
    if suffixes and osp.splitext(path)[1] not in suffixes:
        raise UserError(f'{path} must end in {" or ".join(suffixes)}.')
    if osp.exists(path) and not force:
        raise UserError(
            f'{path} exists. Give another name, or --force to replace the file.'
        )
    check_new_folder(osp.dirname(osp.abspath(path)))
    return path


def check_not_source(new: str, source: str) -> None:
    """Raise a UserError if a file to write is the one that it is made of."""
    source = osp.expanduser(source)
    if osp.exists(new) and osp.exists(source) and osp.samefile(new, source):
        raise UserError(f'{new} would replace what it is made of. Give another name.')


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A name beside ``path`` to write to; renamed to ``path`` when all went well.

    Raises:
        UserError: If the disk is full or the file cannot be written.
    """
    folder, name = osp.split(osp.abspath(path))
    partial = osp.join(folder, f'.{os.getpid()}.partial.{name}')
    try:
        os.makedirs(folder, exist_ok=True)
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    except RuntimeError as error:
        # torch.save's own file tells of a position, and nothing of the disk.
        cause = _why_no_more(partial)
        if cause is None:
            raise
        raise _unwritable(path, cause) from error
    finally:
        if osp.exists(partial):
            os.remove(partial)


def _why_no_more(path: str) -> Optional[OSError]:
    """The error of writing more to a file; None where that can be done."""
    try:
        with open(path, 'ab') as file:
            file.write(bytes(2**16))
    except OSError as error:
        return error
    return None


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(f'{path} cannot be written: {_reason(error)}.')


def _reason(error: OSError) -> str:
    full = 'the disk is full: ' if error.errno in FULL else ''
    return f'{full}{error.strerror or error}'


def write_csv(path: str, rows: Iterable) -> None:
    """Write rows, the first of them the names of the columns, as a CSV file."""
    with whole_file(path) as partial, open(partial, 'w', newline='') as file:
        csv.writer(file).writerows(rows)
