"""What the benchmarks share. It imports nothing large: starting is measured, too."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer


def time_in_turns(
    timers: dict[str, Timer], rounds: int, least: float
) -> dict[str, list[float]]:
    """Seconds of each contestant in every round.

    They take turns, so that a machine that gets busy slows all of them; ratios are
    to be taken within a round. In each round a contestant runs once more than is
    counted, which warms it up.

    Args:
        timers (dict): Timers by name.
        rounds (int): Values wanted of each.
        least (float): Seconds that a value is to be measured for: what is short is
            run more often, and its median taken.
    """
    times = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            found = timer.blocked_autorange(min_run_time=least)
            times[name].append(found.median)
    return times


def resident_peak(forget: bool = False) -> float:
    """Megabytes (2^20 bytes) of memory that this process has held at most.

    On Linux getrusage would count what the parent held before it started this
    process, so the kernel's own mark is read.

    Args:
        forget (bool): Set the mark to what is held now, first. Where the system
            has no such mark, this does nothing. Defaults to False.
    """
    status = Path('/proc/self/status')
    if not status.exists():
        unit = 2**20 if platform.system() == 'Darwin' else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if forget:
        Path('/proc/self/clear_refs').write_text('5')
    line = next(x for x in status.read_text().splitlines() if x.startswith('VmHWM'))
    return int(line.split()[1]) / 2**10


def run_apart(script: str, *options):
    """What a script prints last, as JSON, in a process of its own.

    Raises:
        RuntimeError: If it fails, with the end of what it says.
    """
    command = [sys.executable, script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        # Killed by the kernel (-9) is what running out of memory looks like.
        raise RuntimeError(
            f'{" ".join(command)} ended with code {done.returncode}:\n'
            f'{done.stderr[-2000:]}'
        )
    return json.loads(done.stdout.splitlines()[-1])


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that have the keys of the first."""
    from spvit_mm import utils

    names = list(rows[0])
    table = [[row.get(name, '') for name in names] for row in rows]
    utils.write_csv(str(path), [names, *table])


def write_text(path: Path, text: str) -> None:
    """Write a text as a whole or not at all."""
    from spvit_mm import utils

    with utils.whole_file(str(path)) as partial:
        Path(partial).write_text(text)


def check_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """End with a usage error where nothing can be written to a folder."""
    from spvit_mm import utils

    try:
        utils.check_new_folder(folder)
    except utils.UserError as error:
        parser.error(str(error))
