"""Disks that are full, folders that are read-only, files that go away."""

import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.test_engine.tiny import make_data
from tests.test_robust.forking import TRAIN, environment
from tests.test_robust.trainings import LENGTH, PATIENCE, check_folder, load

pytestmark = [pytest.mark.slow, pytest.mark.robust]


def in_own_mounts(script: str) -> subprocess.CompletedProcess:
    """Run a shell script that may mount, in a namespace that nothing else sees."""
    return subprocess.run(
        ['unshare', '--mount', '--map-root-user', 'bash', '-euc', script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
    )


@pytest.fixture(scope='module')
def _mounts():
    done = in_own_mounts('mount -t tmpfs none /mnt')
    if done.returncode != 0:
        pytest.skip(
            f'nothing can be mounted here ({done.stderr.strip()}); '
            'test_checkpoint_hook.py::test_full_disk has the error of a full disk '
            'injected'
        )


def command(training, work_dir, *more) -> str:
    arguments = [sys.executable, TRAIN, *training.arguments(work_dir), *more]
    return shlex.join(map(str, arguments))


@pytest.mark.usefixtures('_mounts')
def test_full_disk(training, tmp_path):
    """Checkpoints that are all kept fill a disk of 1 MB; the latest one stays."""
    training = training('cls0')
    disk = tmp_path / 'disk'
    disk.mkdir()
    keep = ('--cfg-options', *(
        f'default_hooks.checkpoint.{name}'
        for name in ('max_keep_ckpts=-1', 'save_best=None')
    ))  # fmt: skip
    train = command(training, disk / 'work', *keep)
    done = in_own_mounts(f"""
        mount -t tmpfs -o size=800k none {disk}
        {train} 2> {tmp_path}/errors && exit 1
        cp -a {disk}/work {tmp_path}/full
        mount -o remount,size=64m {disk}
        {train} --resume
        cp -a {disk}/work {tmp_path}/resumed
    """)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'No space left on device' in (tmp_path / 'errors').read_text()
    left = sorted(path.name for path in (tmp_path / 'full').glob('*.pth'))
    assert left == [f'epoch_{i + 1}.pth' for i in range(len(left))]
    assert 0 < len(left) < LENGTH
    for name in left:
        assert 'optimizer' in load(tmp_path / 'full' / name)
    named = (tmp_path / 'full' / 'last_checkpoint').read_text()
    assert named == str(disk / 'work' / left[-1])
    assert not list((tmp_path / 'full').glob('.*'))
    training.assert_ended_alike(tmp_path / 'resumed')


@pytest.mark.usefixtures('_mounts')
def test_read_only_work_dir(training, tmp_path):
    """Told before any training, to root too, with the folder and the reason."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    done = in_own_mounts(f"""
        mount -t tmpfs none {disk}
        mkdir {disk}/work
        mount -o remount,ro {disk}
        {command(training('cls0'), disk / 'work')}
    """)
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [x for x in done.stderr.splitlines() if ': error: ' in x]
    assert 'Read-only file system' in line
    assert f'{disk}/work' in line
    assert 'Epoch(train)' not in done.stdout


@pytest.mark.parametrize('kind', ['cls0', 'cls2'])
def test_lost_file(kind, training, forker, tmp_path):
    """The error names the file; once that is back, the training can go on."""
    training = training(kind)
    data = make_data(tmp_path / 'data')
    lost, kept = data / 'train' / 'b' / '1.png', tmp_path / 'kept.png'
    work_dir, log = tmp_path / 'work', tmp_path / 'log'
    arguments = [
        *training.arguments(work_dir, resume=True),
        '--cfg-options',
        f'train_dataloader.dataset.data_prefix={data}/train',
    ]
    forker.start(arguments, log)
    deadline = time.monotonic() + PATIENCE
    while not (work_dir / 'epoch_2.pth').exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    shutil.move(lost, kept)
    code, _ = forker.wait()
    assert code == 2, log.read_text()[-3000:]
    (line,) = [x for x in log.read_text().splitlines() if ': error: ' in x]
    assert f'{lost} cannot be read' in line
    assert not check_folder(work_dir)['writing']
    shutil.move(kept, lost)
    forker.start(arguments, log)
    code, _ = forker.wait()
    assert code == 0, log.read_text()[-3000:]
    training.assert_ended_alike(work_dir)
