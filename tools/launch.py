"""Start processes with torch.distributed.run; its report is left out where they told
a user's mistake themselves.

Takes the options of ``python -m torch.distributed.run``.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# What the commands of this folder end with after one line on a mistake.
TOLD = 2


def main(argv: list) -> None:
    # Says in other words that a process has failed, which the error below says too.
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').disabled = True
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        if all(failure.exitcode != TOLD for failure in error.failures.values()):
            raise
        sys.exit(TOLD)


if __name__ == '__main__':
    main(sys.argv[1:])
