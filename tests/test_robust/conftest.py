"""What the campaign trains, and its figures at the end."""

import os
from collections import defaultdict

import pytest

from tests.test_engine.tiny import make_data
from tests.test_robust.forking import Forker
from tests.test_robust.trainings import KINDS, SEED, make_training


@pytest.fixture(scope='session')
def forker(tmp_path_factory):
    forker = Forker(tmp_path_factory.mktemp('tmp'))
    yield forker
    forker.close()


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def training(data, forker, tmp_path_factory):
    """A function of a kind: its training, with the uninterrupted run, made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_training(kind, folder, data, forker)
        return made[kind]

    return get


def pytest_terminal_summary(terminalreporter):
    """Print the table of docs/reliability.md."""
    rows = defaultdict(list)
    for outcome in ('passed', 'failed'):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(report.user_properties).get('ended')
            if found is not None and report.when == 'call':
                rows[found['kind'], found['signal']].append((found, report.passed))
    if not rows:
        return
    write = terminalreporter.write_line
    write(f'Drawn from ROBUST_SEED={SEED}, on {os.cpu_count()} cores:')
    write('')
    heads = ['training', 'signal', 'sent', 'while a file is written']
    heads += ['resumed in mid-training', 'resumed and bit-equal']
    write(f'| {" | ".join(heads)} |')
    write('| --- ' * len(heads) + '|')
    for (kind, name), ended in sorted(rows.items()):
        writing = sum(found['writing'] for found, _ in ended)
        middle = sum(found['middle'] for found, _ in ended)
        equal = sum(passed for _, passed in ended)
        cells = [KINDS[kind], name, len(ended), writing, middle, equal]
        write(f'| {" | ".join(map(str, cells))} |')
