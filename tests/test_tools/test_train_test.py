"""The command lines, run as a user runs them on an ImageNet-like folder."""

import importlib.util
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from mmengine.config import Config
from mmengine.utils import ManagerMixin
from mmpretrain.registry import MODELS
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

from spvit_mm.apis import find_resume_checkpoint, run_cli
from spvit_mm.utils import UserError, write_checkpoint
from tests.test_engine.tiny import make_data, write_config

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'


def command(name: str, *arguments) -> None:
    """Run a command line in this process; imports are what takes a new one long."""
    spec = importlib.util.spec_from_file_location('tool', TOOLS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A process of one's own has none: loggers of earlier commands hold output streams
    # that pytest has closed, and visualizers the folder of a command of this second.
    managers = [ManagerMixin]
    for manager in managers:
        managers += manager.__subclasses__()
        manager._instance_dict.clear()
    run_cli(module.main, Path(name).name, [str(a) for a in arguments])


def fails(capsys, name: str, *arguments) -> str:
    """Run a command line that must end in one message and code 2; the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command(name, *arguments)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert 'Traceback' not in text
    (line,) = [x for x in text.splitlines() if ': error: ' in x]
    return line


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """(config, work dir) of a run of one epoch by subprocess, in the default dir."""
    home = tmp_path_factory.mktemp('home')
    config = write_config(home / 'tiny.py', data, length=1)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, str(TOOLS / 'train.py'), 'tiny.py'],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'eta:' in done.stdout + done.stderr
    # What mmcv-lite warns of concerns no model of ours.
    assert 'MultiScaleDeformableAttention' not in done.stderr
    return config, home / 'work_dirs' / 'tiny'


def test_default_work_dir(trained):
    _, work_dir = trained
    assert (work_dir / 'epoch_1.pth').is_file()
    assert (work_dir / 'tiny.py').is_file()


def test_resume(trained, tmp_path, capsys):
    config, work_dir = trained
    here = tmp_path / 'work'
    # A moved work dir: last_checkpoint names the old place.
    shutil.copytree(work_dir, here)
    (here / 'last_checkpoint').write_text('/gone/epoch_1.pth')
    longer = 'train_cfg.max_epochs=2'
    command('train.py', config, '--work-dir', here, '--resume', '--cfg-options', longer)
    out = capsys.readouterr().out
    assert 'resumed epoch: 1' in out
    assert (here / 'epoch_2.pth').is_file()
    assert 'a schedule of another length, which ends at epoch 1.' in out
    # Nothing is left: a job that is queued again ends well, and says so.
    command('train.py', config, '--work-dir', here, '--resume', '--cfg-options', longer)
    out = capsys.readouterr().out
    assert 'Nothing is left to train: the checkpoint was written after epoch 2' in out
    assert 'another length' not in out


def test_resume_of_iterations(data, tmp_path, capsys):
    """The schedule of the config is longer than its training, and is not a change."""
    config = write_config(tmp_path / 'c.py', data, by_epoch=False, length=4)
    work = ('--work-dir', tmp_path / 'w', '--no-validate')
    command('train.py', config, *work, '--cfg-options', 'train_cfg.max_iters=2')
    command('train.py', config, *work, '--resume')
    out = capsys.readouterr().out
    assert 'resumed epoch: 0, iter: 2' in out
    assert 'a schedule of another length, which ends at iter 2.' in out
    shutil.rmtree(tmp_path / 'w')
    options = ('--cfg-options', 'default_hooks.checkpoint.interval=2')
    command('train.py', config, *work, *options)
    command('train.py', config, *work, '--resume', tmp_path / 'w/iter_2.pth')
    assert 'another length' not in capsys.readouterr().out
    command('train.py', config, *work, '--resume')
    out = capsys.readouterr().out
    assert 'after iter 4, and train_cfg.max_iters is 4.' in out


def test_a_work_dir_that_is_not_empty(trained, tmp_path, capsys):
    config, work_dir = trained
    warning = 'holds checkpoints of an earlier training (epoch_1.pth)'
    assert warning not in '\n'.join(p.read_text() for p in work_dir.glob('*/*.log'))
    here = tmp_path / 'work'
    shutil.copytree(work_dir, here)
    command('train.py', config, '--work-dir', here, '--no-validate')
    (line,) = [x for x in capsys.readouterr().out.splitlines() if warning in x]
    assert f'{here} ' in line
    assert '--resume' in line
    options = ('--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    command('train.py', config, '--work-dir', here, '--no-validate', *options)
    assert warning not in capsys.readouterr().out


def test_train_options(trained, tmp_path, capsys):
    config, work_dir = trained
    command(
        'train.py',
        config,
        *('--work-dir', tmp_path, '--amp', '--auto-scale-lr', '--no-validate'),
        *('--no-pin-memory', '--no-persistent-workers'),
        *(
            '--cfg-options',
            'optim_wrapper.optimizer.lr=0.004',
            f'load_from={work_dir}/epoch_1.pth',
        ),
    )
    out = capsys.readouterr().out
    assert 'BFloat16OptimWrapper' in out
    assert 'Epoch(val)' not in out
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    # Batches of 4, base batch size 8.
    assert checkpoint['optimizer']['param_groups'][0]['initial_lr'] == 0.002


def test_test_outputs(trained, tmp_path, capsys):
    config, work_dir = trained
    checkpoint = work_dir / 'epoch_1.pth'
    common = ('test.py', config, checkpoint, '--work-dir', tmp_path / 'w')
    command(*common, '--out', tmp_path / 'p.pkl', '--show-dir', tmp_path / 'pictures')
    with open(tmp_path / 'p.pkl', 'rb') as file:
        predictions = pickle.load(file)
    assert len(predictions) == 6
    assert predictions[0]['pred_score'].shape == (3,)
    pictures = {p.name for p in (tmp_path / 'pictures').iterdir()}
    assert pictures == {f'{name}_{i}_0.png' for name in 'abc' for i in range(2)}

    text = fails(capsys, *common, '--show-dir', tmp_path / 'p', '--interval', '0')
    assert '--interval must be 1 or more' in text
    text = fails(capsys, *common, '--tta', '--show-dir', tmp_path / 'pictures')
    assert 'cannot be combined with --tta' in text
    plt.switch_backend('agg')
    text = fails(capsys, *common, '--show')
    assert 'there is no display to open one on' in text
    assert '--show-dir FOLDER' in text

    metrics = {}
    for name in ('plain', 'tta', 'amp'):
        out = tmp_path / f'{name}.json'
        option = [] if name == 'plain' else [f'--{name}']
        command(*common, '--out', out, '--out-item', 'metrics', *option)
        metrics[name] = json.loads(out.read_text())
    assert all(0 <= m['accuracy/top1'] <= 100 for m in metrics.values())


def test_testing_leaves_the_config_of_the_training(trained, tmp_path):
    config, work_dir = trained
    here = tmp_path / 'work'
    shutil.copytree(work_dir, here)
    before = (here / 'tiny.py').read_text()
    work = ('--work-dir', here, '--cfg-options')
    command('test.py', config, here / 'epoch_1.pth', *work, 'train_cfg.max_epochs=7')
    assert (here / 'tiny.py').read_text() == before
    (own,) = [p for p in here.glob('*/tiny.py') if 'max_epochs=7' in p.read_text()]
    assert list(own.parent.glob('*.log'))


def test_mirror_images_only_where_the_training_has_them(trained, tmp_path, capsys):
    config, work_dir = trained
    text = fails(
        capsys, 'test.py', config, work_dir / 'epoch_1.pth', '--tta',
        '--work-dir', tmp_path, '--cfg-options',
        'train_dataloader.dataset.pipeline=[]',
    )  # fmt: skip
    assert 'the training of this config shows no mirror images' in text
    assert 'Set tta_pipeline' in text


def test_another_models_checkpoint(trained, tmp_path, capsys):
    config, work_dir = trained
    checkpoint = work_dir / 'epoch_1.pth'
    wide = 'model.head.num_classes=5'
    line = fails(
        capsys,
        'test.py',
        config,
        checkpoint,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        wide,
    )
    assert (
        '2 that do not fit: size mismatch for head.layers.head.weight: copying a '
        'param with shape torch.Size([3, 16])' in line
    )
    assert '--allow-partial' in line
    command(
        'test.py',
        config,
        checkpoint,
        '--work-dir',
        tmp_path,
        '--allow-partial',
        '--cfg-options',
        wide,
    )

    nothing = tmp_path / 'other.pth'
    torch.save({'state_dict': {'conv.weight': torch.zeros(3)}}, nothing)
    for name, option in (('test.py', nothing), ('train.py', '--cfg-options')):
        more = [f'load_from={nothing}'] if name == 'train.py' else ['--allow-partial']
        line = fails(capsys, name, config, option, *more, '--work-dir', tmp_path)
        assert '0 of the 32 parameters' in line
        assert 'unknown to the model: conv.weight' in line

    # Fine-tuning with another head is usual, and said in a paragraph.
    command(
        'train.py',
        config,
        '--work-dir',
        tmp_path / 'fine',
        '--cfg-options',
        wide,
        f'load_from={checkpoint}',
    )
    out = capsys.readouterr().out
    assert '30 of the 32 parameters' in out
    line = fails(
        capsys,
        'train.py',
        config,
        '--work-dir',
        tmp_path,
        '--resume',
        checkpoint,
        '--cfg-options',
        wide,
    )
    assert 'cannot be resumed from a checkpoint of another model' in line


def test_a_start_that_loads_next_to_nothing(trained, tmp_path, capsys):
    config, work_dir = trained
    good = work_dir / 'epoch_1.pth'
    state = torch.load(good, weights_only=False)['state_dict']
    timm = {'cls_token': state['backbone.cls_token'], 'blocks.0.x': torch.ones(1)}
    torch.save(timm, tmp_path / 'timm.pth')
    here, inside = 'model.init_cfg', 'model.backbone.init_cfg'
    cases = [
        (here, tmp_path / 'timm.pth', None, 'of the model would load 0 of its 32'),
        (inside, tmp_path / 'timm.pth', None, 'of backbone would load 1 of its 30'),
        (inside, good, None, 'of backbone would load 0 of its 30'),
        (inside, good, 'back', 'names such as back.cls_token'),
        (inside, tmp_path / 'none.pth', 'backbone', 'none.pth does not exist'),
    ]
    for where, path, prefix, words in cases:
        options = [f'{where}.type=Pretrained', f'{where}.checkpoint={path}']
        options += [f'{where}.prefix={prefix}'] if prefix else []
        more = ('--work-dir', tmp_path / 'w', '--cfg-options', *options)
        assert words in fails(capsys, 'train.py', config, *more)
    assert not list((tmp_path / 'w').glob('*.pth'))
    options = [f'{inside}.type=Pretrained', f'{inside}.checkpoint={good}']
    more = ('--work-dir', tmp_path / 'w', '--cfg-options', *options)
    command('train.py', config, *more, f'{inside}.prefix=backbone.')


def test_resuming_without_the_optimizer_is_said(trained, tmp_path, capsys):
    config, work_dir = trained
    content = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    del content['optimizer']
    torch.save(content, tmp_path / 'best.pth')
    arguments = ('train.py', config, '--work-dir', tmp_path / 'w', '--resume')
    longer = ('--cfg-options', 'train_cfg.max_epochs=2')
    command(*arguments, tmp_path / 'best.pth', *longer)
    assert 'no state of the optimizer' in capsys.readouterr().out
    torch.save(dict(state_dict=content['state_dict']), tmp_path / 'weights.pth')
    line = fails(capsys, *arguments, tmp_path / 'weights.pth', *longer)
    assert 'cannot be resumed from this checkpoint' in line


def test_safetensors_as_checkpoint_and_start(trained, tmp_path, capsys):
    config, work_dir = trained
    good, path = work_dir / 'epoch_1.pth', tmp_path / 'model.safetensors'
    write_checkpoint(torch.load(good, weights_only=False), path)
    results = []
    for checkpoint in (good, path):
        out = tmp_path / f'{checkpoint.stem}.json'
        more = ('--out', out, '--out-item', 'metrics', '--work-dir', tmp_path)
        command('test.py', config, checkpoint, *more)
        results.append(out.read_text())
    assert results[0] == results[1]
    # EMAHook takes the weights from the checkpoint, too.
    ema = tmp_path / 'ema.py'
    ema.write_text(f"{config.read_text()}\ncustom_hooks = [dict(type='EMAHook')]\n")
    more = (ema, '--work-dir', tmp_path / 'w', '--no-validate')
    command('train.py', *more, '--cfg-options', f'load_from={path}')
    line = fails(capsys, 'train.py', *more, '--resume', path)
    assert 'cannot be resumed from this checkpoint' in line


def test_bad_paths(trained, tmp_path, capsys):
    config, work_dir = trained
    half = tmp_path / 'half.pth'
    whole = (work_dir / 'epoch_1.pth').read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(')
    empty = tmp_path / 'empty.py'
    empty.write_text("default_scope = 'mmpretrain'")
    cases = [
        (('train.py', tmp_path / 'none.py'), 'none.py cannot be read: it does not exist'),
        (('train.py', tmp_path), f'The config {tmp_path} cannot be read'),
        (('train.py', broken), 'cannot be read'),
        (('train.py', empty), 'lacks model, train_dataloader'),
        (('test.py', config, tmp_path / 'none.pth'), 'none.pth does not exist'),
        (('test.py', config, work_dir), 'Give a file: '),
        (('test.py', config, half), 'damaged or was only partly downloaded'),
        (('test.py', config, work_dir / 'epoch_1.pth', '--out', 'x.txt'), '.pkl'),
        (('test.py', config, work_dir / 'epoch_1.pth', '--out-item', 'pred'), '--out'),
        (('train.py', config, '--resume', tmp_path / 'gone.pth'), 'gone.pth does not'),
        (('train.py', config, '--resume', half), 'damaged or was only partly downloaded'),
        (('train.py', config, '--launcher', 'pytorch'), 'dist_train.sh'),
        (('train.py', config, '--cfg-options', 'model'), 'key=value'),
        (('train.py', config, '--cfg-options', 'model.head.type=Nobody',
          f'work_dir={tmp_path}/w'), 'Nobody is not in'),
        (('train.py', config, '--cfg-options', 'param_scheduler.begin=9',
          'param_scheduler.end=5', f'work_dir={tmp_path}/w'), 'param_scheduler of'),
        (('train.py', config, '--cfg-options', 'optim_wrapper.optimizer.type=No',
          f'work_dir={tmp_path}/w'), 'no registered optimizer'),
        (('train.py', config, '--cfg-options', 'train_dataloader.batch_size=0',
          f'work_dir={tmp_path}/w'), 'batch_size should be a positive integer'),
        (('test.py', config, work_dir / 'epoch_1.pth', '--cfg-options',
          'test_dataloader.num_workers=-1', f'work_dir={tmp_path}/w'),
         'test_dataloader of'),
        (('analysis/get_flops.py', config, '--shape', '0'), 'from 1 on'),
    ]  # fmt: skip
    for arguments, words in cases:
        assert words in fails(capsys, *arguments), arguments
    assert not (tmp_path / 'w').exists() or not list((tmp_path / 'w').glob('*.pth'))


def test_resume_without_a_checkpoint(trained, tmp_path, capsys):
    """A job that is queued again always passes --resume, the first time too."""
    config, work_dir = trained
    here = tmp_path / 'work'
    here.mkdir()
    # Only the best one, before the first that can be resumed.
    (here / 'best_accuracy_epoch_1.pth').touch()
    start = f'load_from={work_dir}/epoch_1.pth'
    options = ('--work-dir', here, '--no-validate', '--resume', '--cfg-options', start)
    command('train.py', config, *options)
    out = capsys.readouterr().out
    assert f'There is nothing to resume in {here}: a new training starts.' in out
    assert f'Load checkpoint from {work_dir}/epoch_1.pth' in out
    assert 'resumed epoch' not in out
    command('train.py', config, *options, 'train_cfg.max_epochs=2')
    out = capsys.readouterr().out
    assert 'nothing to resume' not in out
    assert 'resumed epoch: 1' in out


def test_pointers_that_lose_a_training(tmp_path):
    """What was trained is named, and neither lost nor trained again in silence."""
    work_dir, pointer = str(tmp_path), tmp_path / 'last_checkpoint'
    pointer.write_text('/gone/epoch_7.pth')
    with pytest.raises(UserError, match='names /gone/epoch_7.pth, which does not'):
        find_resume_checkpoint(work_dir)
    (tmp_path / 'epoch_3.pth').touch()
    (tmp_path / 'best_accuracy_epoch_2.pth').touch()
    with pytest.raises(UserError, match='holds epoch_3.pth; name .* --resume PATH'):
        find_resume_checkpoint(work_dir)
    pointer.write_text('')
    with pytest.raises(UserError, match='is empty: that folder holds epoch_3.pth;'):
        find_resume_checkpoint(work_dir)
    pointer.unlink()
    (tmp_path / 'epoch_6.pth').touch()
    with pytest.raises(UserError, match='does not exist: that folder holds epoch_3'):
        find_resume_checkpoint(work_dir)
    (tmp_path / 'epoch_3.pth').unlink()
    (tmp_path / 'epoch_6.pth').rename(tmp_path / 'weights.pth')
    with pytest.raises(UserError, match='does not exist: that folder holds weights'):
        find_resume_checkpoint(work_dir)
    (tmp_path / 'weights.pth').unlink()
    assert find_resume_checkpoint(work_dir) is None


def test_our_own_errors_keep_their_traceback(trained, tmp_path, monkeypatch):
    """Only a mistake of the user becomes one line."""
    config, work_dir = trained

    def broken(*args, **kwargs):
        raise TypeError('a bug of ours')

    monkeypatch.setattr('mmpretrain.models.ImageClassifier.loss', broken)
    monkeypatch.setattr('mmpretrain.models.ImageClassifier.predict', broken)
    monkeypatch.setattr('mmpretrain.models.ImageClassifier.extract_feat', broken)
    work = ('--work-dir', tmp_path)
    for arguments in (
        ('train.py', config, *work),
        ('test.py', config, work_dir / 'epoch_1.pth', *work),
        ('analysis/get_flops.py', config),
        ('visualization/show_attention.py', config, work_dir / 'epoch_1.pth', '--query',
         '0', '0'),
    ):  # fmt: skip
        with pytest.raises(TypeError, match='a bug of ours'):
            command(*arguments)


def test_data_without_a_batch(data, tmp_path, capsys):
    """Neither kind of loop trains on it, and neither says so."""
    options = ('train_dataloader.batch_size=64', 'train_dataloader.drop_last=True')
    for by_epoch in (True, False):
        config = write_config(
            tmp_path / 'c.py', data, by_epoch=by_epoch, sampler='DefaultSampler'
        )
        work = ('--work-dir', tmp_path / 'w')
        line = fails(capsys, 'train.py', config, *work, '--cfg-options', *options)
        assert 'makes no batch of 64' in line


def test_flexible_runner(data, tmp_path, capsys):
    """It builds its parts itself."""
    more = (
        "runner_type = 'FlexibleRunner'\nstrategy = dict(type='SingleDeviceStrategy')"
    )
    config = write_config(tmp_path / 'c.py', data, length=1, more=more)
    command('train.py', config, '--work-dir', tmp_path / 'w')
    before = (tmp_path / 'w/c.py').read_text()
    command('test.py', config, tmp_path / 'w/epoch_1.pth', '--work-dir', tmp_path / 'w')
    assert (tmp_path / 'w/c.py').read_text() == before
    capsys.readouterr()
    command('train.py', config, '--work-dir', tmp_path / 'w', '--resume')
    assert 'Nothing is left to train' in capsys.readouterr().out


@pytest.mark.parametrize('workers', [0, 1])
def test_corrupt_image(trained, data, tmp_path, capsys, workers):
    config, work_dir = trained
    shutil.copytree(data / 'train', tmp_path / 'train')
    for name in ('a/0.png', 'b/1.png'):
        (tmp_path / 'train' / name).write_bytes(b'' if name[0] == 'a' else b'no image')
    options = (
        *('--work-dir', tmp_path / 'w', '--cfg-options'),
        f'train_dataloader.dataset.data_prefix={tmp_path}/train',
        f'train_dataloader.num_workers={workers}',
    )
    line = fails(capsys, 'train.py', config, *options)
    assert 'The file ' in line
    assert ('it is empty' in line) == ('(0 bytes)' in line)
    assert 'a/0.png (0 bytes)' in line or 'b/1.png (8 bytes)' in line
    assert '--skip-corrupt-images' in line
    command('train.py', config, '--skip-corrupt-images', *options)
    (log,) = [
        t
        for t in (p.read_text() for p in (tmp_path / 'w').glob('*/*.log'))
        if 'Left' in t
    ]
    assert 'Left out. The file' in log
    assert 'images that could not be read were left out' in log

    # In testing nothing is left out: the figures would be those of other data.
    line = fails(
        capsys, 'test.py', config, work_dir / 'epoch_1.pth', '--work-dir', tmp_path,
        '--cfg-options', f'test_dataloader.dataset.data_prefix={tmp_path}/train',
        f'test_dataloader.num_workers={workers}',
    )  # fmt: skip
    assert 'a/0.png (0 bytes) cannot be read: it is empty. Replace' in line


def test_get_flops(trained, capsys):
    config, _ = trained
    command('analysis/get_flops.py', config)
    small = capsys.readouterr().out
    command('analysis/get_flops.py', config, '--shape', '32')
    large = capsys.readouterr().out
    assert 'Input shape: (3, 16, 16)' in small
    assert 'Input shape: (3, 32, 32)' in large
    # Patch embedding, per layer qkv, projection, two products and two feedforward
    # layers, the head, and mmengine's 5 a norm element: for 5 tokens of width 16.
    n, c = 5, 16
    layer = n * c * 3 * c + n * c * c + 2 * n * n * c + 2 * n * c * 32 + 2 * 5 * n * c
    total = 4 * c * 3 * 64 + 2 * layer + 5 * n * c + c * 3
    assert f'({total:,})' in small


def test_scripts(trained, data, tmp_path):
    """The distributed scripts pass their arguments on as they came."""
    config, work_dir = trained
    environment = dict(
        os.environ,
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        OMP_NUM_THREADS='1',
        PORT='29567',
    )
    spaced = tmp_path / 'a b'
    spaced.mkdir()
    shutil.copy(config, spaced / 'tiny.py')
    done = subprocess.run(
        [str(TOOLS / 'dist_test.sh'), str(spaced / 'tiny.py')]
        + [str(work_dir / 'epoch_1.pth'), '2', '--work-dir', str(spaced / 'w')]
        + ['--out', str(spaced / 'm.json'), '--out-item', 'metrics'],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'accuracy/top1' in json.loads((spaced / 'm.json').read_text())

    # srun here is a script that prints what it is called with.
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment.update(
        PATH=f'{tmp_path}:{environment["PATH"]}', SRUN_ARGS='--time=1:00 --mem=2G'
    )
    for script, last in (('slurm_train.sh', 'work dir'), ('slurm_test.sh', 'c.pth')):
        done = subprocess.run(
            [str(TOOLS / script), 'part', 'my job', str(spaced / 'tiny.py'), last]
            + ['--cfg-options', 'a="b c"'],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert '--job-name=my job' in lines
        assert '--mem=2G' in lines
        assert str(spaced / 'tiny.py') in lines
        assert last in lines
        assert lines[-1] == 'a="b c"'
    for script in [*TOOLS.glob('dist_*.sh'), *TOOLS.glob('slurm_*.sh')]:
        done = subprocess.run([str(script)], capture_output=True, text=True)
        assert done.returncode == 2
        assert 'Usage' in done.stderr


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_one_line(tmp_path):
    environment = dict(
        os.environ,
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        PORT='29573',
    )
    done = subprocess.run(
        [str(TOOLS / 'dist_train.sh'), str(tmp_path / 'none.py'), '2'],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if 'error' in x.lower()]
    assert line.startswith('train.py: error: The config ')
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('code', [1, 2, -9])
def test_the_launcher_repeats_no_mistake_of_the_user(code, monkeypatch):
    failures = {
        rank: ProcessFailure(rank, 7, exitcode, 'no file')
        for rank, exitcode in ((0, -15), (1, code))
    }

    def launch(args):
        assert args.training_script == 'train.py'
        raise ChildFailedError('train.py', failures)

    monkeypatch.setattr('torch.distributed.run.run', launch)
    with pytest.raises(SystemExit if code == 2 else ChildFailedError) as error:
        runpy.run_path(str(TOOLS / 'launch.py'))['main'](['train.py'])
    assert code != 2 or error.value.code == 2


def test_a_deployed_checkpoint_is_told_in_words(tmp_path, capsys, mmpretrain_scope):
    """By test.py, too, which loads it deep inside mmengine."""
    config = str(ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py')
    model = MODELS.build(Config.fromfile(config).model)
    model.backbone.switch_to_deploy()
    path = tmp_path / 'deployed.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    message = fails(capsys, 'test.py', config, path, '--work-dir', tmp_path / 'work')
    assert 'The checkpoint is in deploy form' in message
