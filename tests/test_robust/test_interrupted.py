"""Trainings that a signal ends at any moment go on as if nothing had happened.

ROBUST_SEED, an environment variable, draws the moments; the machine's timing decides
what they hit.
"""

import random
import signal

import pytest

from tests.test_robust.trainings import SEED, check_folder

pytestmark = [pytest.mark.slow, pytest.mark.robust]
KILLS = dict(cls0=34, cls2=32, seg=24, two=10)
TERMS = dict(cls0=4, cls2=4, seg=4, two=2)


def cases(counts: dict) -> list:
    return [(kind, i) for kind, count in counts.items() for i in range(count)]


def interrupt_and_resume(training, kind, number, sent, work_dir, record_property):
    name = signal.Signals(sent).name
    moment = f'{SEED} {name} {kind} {number}'
    print(f'Drawn from {moment!r}')
    training = training(kind)
    training.interrupt(random.Random(moment), sent, work_dir)
    left = check_folder(work_dir)
    middle = left['latest'] not in (None, training.last)
    ended = dict(kind=kind, signal=name, writing=left['writing'], middle=middle)
    record_property('ended', ended)
    training.assert_resumes(work_dir)


@pytest.mark.parametrize(('kind', 'number'), cases(KILLS))
def test_killed(kind, number, training, tmp_path, record_property):
    work_dir = tmp_path / 'work'
    interrupt_and_resume(
        training, kind, number, signal.SIGKILL, work_dir, record_property
    )


@pytest.mark.parametrize(('kind', 'number'), cases(TERMS))
def test_terminated(kind, number, training, tmp_path, record_property):
    """SIGTERM saves nothing half, nor anything at all."""
    work_dir = tmp_path / 'work'
    interrupt_and_resume(
        training, kind, number, signal.SIGTERM, work_dir, record_property
    )
