"""Tiny trainings that can be interrupted, resumed and compared."""

import os
import random
import select
import signal as signals
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from glob import escape
from pathlib import Path

import pytest
import torch

from tests.test_engine.tiny import write_config
from tests.test_robust.forking import ROOT, TRAIN, Forker, environment

SEED = os.environ.get('ROBUST_SEED', '0')
KINDS = dict(
    cls0='classification, no workers',
    cls2='classification, 2 workers',
    seg='segmentation',
    two='classification, 2 processes',
)
MORE = """
model['backbone'].update(type='SPViT', num_spsa_layers=1)
default_hooks['checkpoint'].update(max_keep_ckpts=2, save_best='auto')
"""
SEG_OPTIONS = (
    'train_cfg.max_iters=24',
    'default_hooks.checkpoint.max_keep_ckpts=2',
    'default_hooks.checkpoint.save_best=mIoU',
)
# What tells of hours and folders.
UNEQUAL = ('message_hub', 'meta')
LENGTH = 12
PATIENCE = 300


class Training:
    """A training, and how it ends when nothing interrupts it.

    Args:
        config (Path): Its config.
        last (str): Name of its last checkpoint.
        folder (Path): Where the uninterrupted run goes.
        forker (Forker): What starts it.
        options (tuple[str]): Further options of train.py.
    """

    def __init__(self, config, last, folder, forker: Forker, options=()) -> None:
        self.config = config
        self.last = last
        self.options = options
        self.forker = forker
        self.seconds = self.run_whole(folder)

    def run_whole(self, folder: Path) -> float:
        """Train without interruption; the seconds that an interrupted one would take.

        In an interpreter of its own, and forked for the time: both must end alike.
        """
        subprocess.run(
            [sys.executable, TRAIN, *self.arguments(folder / 'whole')],
            check=True,
            capture_output=True,
            env=environment(),
            timeout=PATIENCE,
        )
        self.expected = load(folder / 'whole' / self.last)
        code, seconds = self.run(folder / 'forked')
        assert code == 0
        self.assert_ended_alike(folder / 'forked')
        return seconds

    def arguments(self, work_dir: Path, resume: bool = False) -> list:
        resuming = ['--resume'] * resume
        options = map(str, (self.config, '--work-dir', work_dir, *self.options))
        return [*options, *resuming]

    def run(self, work_dir: Path, resume=False, end=None) -> tuple[int, float]:
        """Train; the exit code (-n: signal n ended it) and the seconds."""
        log = work_dir.with_suffix('.log')
        self.forker.start(self.arguments(work_dir, resume), log, end)
        return self.forker.wait()

    def draw_end(self, draws: random.Random, signal: int, work_dir: Path) -> dict:
        """A moment to send a signal: any, or one at which a file is written."""
        partial = f'{escape(str(work_dir))}/.*.partial.*'
        return dict(
            signal=signal,
            writing=draws.choice((None, partial)),
            after=draws.uniform(0, self.seconds),
        )

    def interrupt(self, draws: random.Random, signal: int, work_dir: Path) -> None:
        """Train until a signal ends the training at a moment that is drawn.

        A training that ends before is no trial: it tells how long one takes now, and
        another moment is drawn.
        """
        for _ in range(20):
            end = self.draw_end(draws, signal, work_dir)
            code, seconds = self.run(work_dir, end=end)
            if code != 0:
                self.check_code(code, signal, work_dir)
                return
            self.seconds = seconds
            os.rename(work_dir, work_dir.with_name(f'over_{time.monotonic_ns()}'))
        raise AssertionError('the training was over before the signal, 20 times')

    def check_code(self, code: int, signal: int, work_dir: Path) -> None:
        assert code == -signal, self.printed(work_dir)[-3000:]

    def printed(self, work_dir: Path) -> str:
        return work_dir.with_suffix('.log').read_text()

    def assert_resumes(self, work_dir: Path) -> None:
        """The interrupted training goes on to the end of the uninterrupted one."""
        code, _ = self.run(work_dir, resume=True)
        assert code == 0, self.printed(work_dir)[-3000:]
        self.assert_ended_alike(work_dir)
        assert check_folder(work_dir) == dict(latest=self.last, writing=False)
        # A kill between writing a file and removing the one that it replaces leaves
        # one more: of two checkpoints, and of the best.
        names = [path.name for path in work_dir.glob('*.pth')]
        best = [name for name in names if name.startswith('best_')]
        assert len(best) <= 2
        assert len(names) - len(best) <= 3

    def assert_ended_alike(self, work_dir: Path) -> None:
        found = list(differences(load(work_dir / self.last), self.expected))
        assert not found


class TwoProcesses(Training):
    """Two processes that torch.distributed.run starts, each a new interpreter."""

    def run_whole(self, folder):
        code, seconds = self.run(folder / 'whole')
        assert code == 0, self.printed(folder / 'whole')[-3000:]
        self.expected = load(folder / 'whole' / self.last)
        return seconds

    def run(self, work_dir, resume=False, end=None):
        command = ['bash', str(ROOT / 'tools' / 'dist_train.sh')]
        config, *arguments = self.arguments(work_dir, resume)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        earlier = set(work_dir.glob('*/*.log'))
        with open(work_dir.with_suffix('.log'), 'a') as log:
            launcher = subprocess.Popen(
                [*command, config, '2', *arguments],
                env=environment(PORT=str(port)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE
        # Most of the time goes into imports: it counts from the runner's first sign.
        while launcher.poll() is None and earlier.issuperset(work_dir.glob('*/*.log')):
            assert time.monotonic() < deadline, 'no runner was built'
            time.sleep(0.01)
        start = time.monotonic()
        ranks = {} if end is None else rank_handles(launcher.pid)
        if end is not None:
            assert len(ranks) == 2, self.printed(work_dir)[-3000:]
            time.sleep(end['after'])
            for name in end['victims']:
                with suppress(ProcessLookupError):  # it was over
                    if name == 'launcher':
                        launcher.send_signal(end['signal'])
                    else:
                        signals.pidfd_send_signal(ranks[name], end['signal'])
        code = launcher.wait(timeout=PATIENCE)
        seconds = time.monotonic() - start
        for name, handle in ranks.items():
            ended, _, _ = select.select([handle], [], [], PATIENCE)
            assert ended, f'{name} lives on'
            os.close(handle)
        return code, seconds

    def draw_end(self, draws, signal, work_dir):
        choices = [['rank 0'], ['rank 1'], ['launcher', 'rank 0', 'rank 1']]
        if signal != signals.SIGKILL:  # the launcher passes it on
            choices = [['launcher']]
        victims = draws.choice(choices)
        after = draws.uniform(0, self.seconds)
        return dict(signal=signal, after=after, victims=victims)

    def check_code(self, code, signal, work_dir):
        """The launcher ends with a code of its own where a rank was killed."""


def rank_handles(launcher: int) -> dict:
    """{'rank 0': handle, ...} of the processes that a launcher has started.

    A handle, unlike a number, never comes to mean another process.
    """
    found = {}
    for path in Path('/proc', str(launcher), 'task').glob('*/children'):
        for child in path.read_text().split():
            variables = Path('/proc', child, 'environ').read_bytes().split(b'\0')
            ranks = [v[5:].decode() for v in variables if v.startswith(b'RANK=')]
            found.update({f'rank {rank}': os.pidfd_open(int(child)) for rank in ranks})
    return found


def make_training(kind: str, folder: Path, data: Path, forker: Forker) -> Training:
    """The training of a kind, its config written, run once without interruption."""
    if kind == 'seg':
        pytest.importorskip('mmseg.models')
        from tests.test_tools.test_segmentation import write_config as write_seg_config

        config = write_seg_config(folder, 'SPViT')
        options = ('--cfg-options', *SEG_OPTIONS)
        return Training(config, 'iter_24.pth', folder, forker, options)
    workers = 2 if kind == 'cls2' else 0
    config = write_config(
        *(folder / f'{kind}.py', data),
        length=LENGTH,
        workers=workers,
        persistent=workers > 0,
        more=MORE,
    )
    made = TwoProcesses if kind == 'two' else Training
    return made(config, f'epoch_{LENGTH}.pth', folder, forker)


def load(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def differences(actual, expected, name: str = 'checkpoint') -> Iterator[str]:
    """Where two checkpoints differ in a bit."""
    if isinstance(expected, dict):
        keys = expected.keys() - set(UNEQUAL)
        if actual.keys() - set(UNEQUAL) != keys:
            yield f'{name}: {sorted(actual)}'
        for key in keys & actual.keys():
            yield from differences(actual[key], expected[key], f'{name}.{key}')
    elif isinstance(expected, (list, tuple)):
        if len(actual) != len(expected):
            yield f'{name}: {len(actual)} entries'
            return
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            yield from differences(*pair, f'{name}.{i}')
    elif isinstance(expected, torch.Tensor):
        if actual.dtype != expected.dtype or not torch.equal(actual, expected):
            yield name
    elif actual != expected:
        yield f'{name}: {actual} {expected}'


def check_folder(work_dir: Path) -> dict:
    """What an interrupted training has left: nothing that looks whole and is not.

    Returns:
        dict: ``latest``, the name of the checkpoint to resume, None before the first
        one; ``writing``, whether a part of a file lies there under a name of its own.
    """
    paths = list(work_dir.glob('[!.]*.pth'))
    for path in paths:
        assert 'state_dict' in load(path)
    pointer = work_dir / 'last_checkpoint'
    steps = [path for path in paths if not path.name.startswith('best_')]
    if pointer.exists():
        assert 'optimizer' in load(Path(pointer.read_text()))
    else:  # the pointer follows the first file
        assert len(steps) <= 1
    latest = Path(pointer.read_text()).name if pointer.exists() else None
    return dict(latest=latest, writing=bool(list(work_dir.glob('.*.partial.*'))))
