"""A process that has imported what training needs, and forks one for each training.

Importing is most of what a tiny training costs. A fork is a process like any other: it
has its own memory, runs tools/train.py from its first line, and is killed by the kernel
with nothing said to it. What it takes over are imported modules alone, which hold no
state of a training; the process that forks has no threads and runs no training itself.
One thing is less real: forks share the seed by which Python orders sets of strings. So
what they are compared with comes from an interpreter of its own.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / 'tools' / 'train.py')


def environment(**more) -> dict:
    """The environment of a training: one thread a process, this Python first."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return dict(
        os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PATH=path, **more
    )


class Forker:
    """Starts trainings; used by the tests.

    Args:
        folder (Path): For temporary files that killed trainings leave.
    """

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(TMPDIR=str(folder)),
        )
        threads = json.loads(self._process.stdout.readline())
        assert threads == 1, 'a process with threads cannot be forked safely'

    def start(self, args: list, log: Path, end: Optional[dict] = None) -> None:
        """Start a training.

        Args:
            args (list): The arguments of train.py.
            log (Path): Where to write what it prints.
            end (dict, optional): How it ends before its time: ``signal``; ``after``,
                the seconds until then; ``writing``, the glob of a file to wait for
                from then on.
        """
        job = dict(args=[str(a) for a in args], log=str(log), end=end)
        self._process.stdin.write(json.dumps(job) + '\n')
        self._process.stdin.flush()

    def wait(self) -> tuple[int, float]:
        """Wait for the training; its exit code (-n: signal n ended it) and seconds."""
        return tuple(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def watch(pid: int, end: Optional[dict]) -> tuple[int, float]:
    """Send a signal to a child when it is due, and wait for its end."""
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended:
            return os.waitstatus_to_exitcode(status), seconds
        due = end is not None and seconds >= end['after']
        if due and (end['writing'] is None or glob(end['writing'])):
            os.kill(pid, end['signal'])
            end = None
        time.sleep(0.0002 if due else 0.002)


def redirect(log: str) -> None:
    """Let this process print to a file and read nothing."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def serve() -> None:
    """Fork for every line of the input; in a child, run the training."""
    # The libraries print while they are imported.
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    import matplotlib.pyplot  # noqa: F401
    import mmpretrain.models  # noqa: F401
    import torch.distributed  # noqa: F401

    import spvit_mm.apis  # noqa: F401

    with suppress(ImportError):  # it is optional, and mmcv-lite cannot import it
        import mmseg.models  # noqa: F401

    print(len(os.listdir('/proc/self/task')), file=answers)
    for line in iter(sys.stdin.readline, ''):
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            break
        print(json.dumps(watch(pid, job['end'])), file=answers)
    else:
        return
    answers.close()
    redirect(job['log'])
    sys.argv = [TRAIN, *job['args']]
    runpy.run_path(TRAIN, run_name='__main__')


if __name__ == '__main__':
    serve()
