"""What every command line shares: errors told in words."""

import atexit
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Optional

import torch
import torch.distributed as dist

from spvit_mm_cli import TRUST

from ..utils import UserError, describe_error, safe_loader

TRACEBACK = 'SPVIT_MM_TRACEBACK'


def run_cli(main: Callable, prog: str, argv: Optional[list] = None) -> None:
    """Run a command line; a user's mistake is one message and exit code 2.

    Checkpoints are opened without running what they hold, unless the arguments say
    ``--trust-checkpoint``.

    Args:
        main (callable): Takes the list of arguments.
        prog (str): Name of the command, put before the message.
        argv (list, optional): The arguments. Defaults to those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with safe_loader(trust=TRUST in argv):
            main(argv)
    except (UserError, MemoryError, RuntimeError) as error:
        reason = str(error) if isinstance(error, UserError) else _out_of_memory(error)
        if reason is None:
            raise
        # All processes of a launch make the same mistakes. The first one tells; after it
        # ended the launcher ends the others. A mistake that is another's own, such as an
        # image of its share, is told by that one.
        if int(os.environ.get('RANK', 0)):
            time.sleep(15)
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        # One that a data-loading worker raised comes with the worker's traceback.
        message = reason.rsplit(f'{type(error).__name__}: ', 1)[-1]
        print(f'{prog}: error: {message.strip()}', file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == 'gloo':
        # Threads of gloo outlive the interpreter's end, which now and then makes it
        # "terminate called" with all work done; destroying the group does not help.
        # Loggers, trackers and data workers still get their own end.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _out_of_memory(error: Exception) -> Optional[str]:
    """What to say of an error that is memory running out; None for any other."""
    text = str(error)
    known = (MemoryError, torch.cuda.OutOfMemoryError)
    if not isinstance(error, known) and "can't allocate memory" not in text:
        return None
    asked = re.search(r'[Tt]ried to allocate [\d.,]+ ?\w+', text)
    return (
        f'There is not enough memory{f" ({asked[0]})" if asked else ""}. Ask for less at '
        'a time: a smaller image, grid or batch.'
    )


@contextmanager
def building(what: str):
    """Turn an error of building a part of a config into a UserError.

    For the building alone, never for what the built part computes: an error in there
    is ours, and keeps its traceback.

    Args:
        what (str): What is built, and of which config.

    Raises:
        UserError: In place of the error. Set the environment variable
            SPVIT_MM_TRACEBACK to see where that was raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the part is of any class, which can raise anything
        raise UserError(
            f'{what} cannot be built: {type(error).__name__}: {describe_error(error)} '
            f'(set {TRACEBACK}=1 to see where this was raised)'
        ) from error
