"""Checkpoints appear whole or not at all."""

import errno
import os
import os.path as osp
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

from spvit_mm.apis import find_resume_checkpoint
from spvit_mm.utils import UserError, read_checkpoint
from tests.test_engine.tiny import make_data, write_config


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def make_runner(config, work_dir, **options) -> Runner:
    cfg = Config.fromfile(config)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{work_dir.parent.name}_{len(os.listdir(work_dir))}'
    cfg.merge_from_dict(
        {f'default_hooks.checkpoint.{k}': v for k, v in options.items()}
    )
    return Runner.from_cfg(cfg)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_while_writing(data, tmp_path, monkeypatch):
    """The older checkpoint stays whole and named; the new one does not exist."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=3)
    runner = make_runner(config, work_dir, max_keep_ckpts=1)
    put = type(runner.hooks[-1]).__mro__[1]  # CheckpointHook, to see it is a subclass
    assert put.__name__ == 'CheckpointHook'

    def half(self, obj, filepath):
        whole = 'epoch_2' not in osp.basename(filepath)
        with open(filepath, 'wb') as file:
            file.write(obj if whole else obj[: len(obj) // 2])
        if not whole:
            raise Killed

    monkeypatch.setattr(LocalBackend, 'put', half)
    # A killed process cleans nothing up.
    monkeypatch.setattr('os.remove', lambda _: None)
    with pytest.raises(Killed):
        runner.train()
    monkeypatch.undo()

    assert sorted(p.name for p in work_dir.glob('[!.]*.pth')) == ['epoch_1.pth']
    (partial,) = work_dir.glob('.*.partial.*')
    assert partial.name.endswith('epoch_2.pth')
    assert partial.stat().st_size > 0
    named = (work_dir / 'last_checkpoint').read_text()
    assert named == str(work_dir / 'epoch_1.pth')
    assert 'optimizer' in torch.load(named, weights_only=False)

    # The next start cleans up, and goes on from the older one.
    again = make_runner(config, work_dir, max_keep_ckpts=1)
    again._resume = True
    again.train()
    assert sorted(p.name for p in work_dir.glob('*.pth')) == ['epoch_3.pth']
    assert not list(work_dir.glob('.*'))
    assert (work_dir / 'last_checkpoint').read_text().endswith('epoch_3.pth')


def test_killed_before_the_first_pointer(data, tmp_path, monkeypatch):
    """The first checkpoint is there, and nothing names it: --resume finds it."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=1)
    runner = make_runner(config, work_dir)
    replace = os.replace

    def killed(source, target):
        if osp.basename(target) == 'last_checkpoint':
            raise Killed
        replace(source, target)

    monkeypatch.setattr('os.replace', killed)
    with pytest.raises(Killed):
        runner.train()
    assert not (work_dir / 'last_checkpoint').exists()
    assert find_resume_checkpoint(str(work_dir)) == str(work_dir / 'epoch_1.pth')


def test_full_disk(data, tmp_path, monkeypatch):
    """The older checkpoint stays whole and named; the error tells of the disk."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=2)
    runner = make_runner(config, work_dir, max_keep_ckpts=1)
    put = LocalBackend.put

    def full(self, obj, filepath):
        if 'epoch_2' not in osp.basename(filepath):
            return put(self, obj, filepath)
        put(self, obj[: len(obj) // 2], filepath)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalBackend, 'put', full)
    with pytest.raises((OSError, UserError), match='No space left on device'):
        runner.train()
    assert [p.name for p in work_dir.glob('*.pth')] == ['epoch_1.pth']
    named = (work_dir / 'last_checkpoint').read_text()
    assert named == str(work_dir / 'epoch_1.pth')
    assert 'optimizer' in torch.load(named, weights_only=False)
    assert not list(work_dir.glob('.*'))


def test_old_ones_go_after_new_ones_are_there(data, tmp_path, monkeypatch):
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=4)
    runner = make_runner(config, work_dir, max_keep_ckpts=1, save_best='auto')
    remaining, remove = [], LocalBackend.remove

    def watched(self, path):
        remove(self, path)
        remaining.append(sorted(p.name for p in work_dir.glob('*.pth')))
        pointer = (work_dir / 'last_checkpoint').read_text()
        assert osp.isfile(pointer)

    monkeypatch.setattr(LocalBackend, 'remove', watched)
    runner.train()
    assert len(remaining) >= 3
    assert all(any(n.startswith('epoch_') for n in names) for names in remaining)
    assert all(any(n.startswith('best_') for n in names) for names in remaining[1:])
    assert (work_dir / 'epoch_4.pth').is_file()
    assert len(list(work_dir.glob('best_*.pth'))) == 1


def test_same_best_name_is_kept(data, tmp_path):
    """A best checkpoint that replaces one of its own name is not removed."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=1)
    runner = make_runner(config, work_dir, save_best='auto')
    runner.train()
    (best,) = work_dir.glob('best_*.pth')
    hook = runner.hooks[-1]
    hook._save_best_checkpoint(runner, {hook.key_indicators[0]: 1e6})
    assert best.is_file()
    assert hook.file_backend.__class__.__name__ == 'LocalBackend'


def test_published(data, tmp_path):
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=1)
    runner = make_runner(config, work_dir, published_keys=['meta', 'state_dict'])
    runner.train()
    (published,) = work_dir.glob('epoch_1-*.pth')
    import hashlib

    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert published.name == f'epoch_1-{digest[:8]}.pth'
    assert set(torch.load(published, weights_only=False)) == {'meta', 'state_dict'}
    assert not list(work_dir.glob('.*'))


def test_a_copied_folder_leaves_the_first_alone(data, tmp_path):
    """Resuming in a copy removes nothing of the folder that was copied."""
    import shutil

    work_dir, copy = tmp_path / 'work', tmp_path / 'copy'
    work_dir.mkdir()
    config = write_config(tmp_path / 'c.py', data, length=1)
    make_runner(config, work_dir, save_best='auto').train()
    before = sorted(p.name for p in work_dir.glob('*.pth'))
    shutil.copytree(work_dir, copy)
    write_config(config, data, length=2)
    runner = make_runner(config, copy, save_best='auto', max_keep_ckpts=1)
    runner._resume, runner._load_from = True, str(copy / 'epoch_1.pth')
    runner.register_hook(_NextIsBetter(), priority='HIGHEST')
    runner.train()
    assert sorted(p.name for p in work_dir.glob('*.pth')) == before


class _NextIsBetter(Hook):
    def after_val_epoch(self, runner, metrics=None):
        metrics['accuracy/top1'] = np.float64(1e6)  # mmseg's metrics are numpy's


class _Watch(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        hub, schedulers = checkpoint['message_hub'], checkpoint.get('param_schedulers')
        runner.saved = hub, schedulers

    def before_train(self, runner):
        (scheduler,) = runner.param_schedulers
        runner.restored = runner.message_hub.state_dict(), scheduler.state_dict()


def types_in(value) -> set:
    items = []
    if isinstance(value, dict):
        items = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    return {type(value)}.union(*map(types_in, items))


def test_resumed_from_plain_types(data, tmp_path):
    """What mmengine stores as objects is written plainly, and comes back the same."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    milestones = 'param_scheduler = dict(type="MultiStepLR", milestones=[1, 2])'
    config = write_config(tmp_path / 'c.py', data, length=2, more=milestones)
    runner = make_runner(config, work_dir, save_best='auto')
    runner.register_hook(_NextIsBetter(), priority='HIGHEST')
    runner.register_hook(_Watch())
    runner.train()
    want, schedulers = runner.saved
    assert type(want['runtime_info']['best_score']) is np.float64
    for path in work_dir.glob('*.pth'):
        content = read_checkpoint(path, plain=True)  # before PyTorch 2.4, too
        plain = {dict, OrderedDict, list, tuple, torch.Tensor}
        assert types_in(content) <= plain | {str, int, float, bool, type(None)}

    write_config(config, data, length=3, more=milestones)
    again = make_runner(config, work_dir)
    again._resume, again._load_from = True, str(work_dir / 'epoch_2.pth')
    again.register_hook(_Watch())
    again.train()
    got, scheduler = again.restored
    assert 'train/loss' in want['log_scalars']
    assert list(got['log_scalars']) == list(want['log_scalars'])
    for key, history in want['log_scalars'].items():
        assert type(got['log_scalars'][key]) is HistoryBuffer
        assert got['log_scalars'][key].max_length == history.max_length
        for a, b in zip(got['log_scalars'][key].data, history.data, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert [scheduler] == schedulers
