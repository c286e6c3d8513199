import argparse
import fcntl
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from scipy import stats

from spvit_mm.apis import run_cli
from spvit_mm.utils import UserError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('study', ROOT / 'benchmarks/study.py')
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

ARGS = argparse.Namespace(seeds=2, val_interval=5, epochs=None)


@pytest.fixture
def cfg():
    return Config.fromfile(str(study.CONFIG))


def test_unknown_study_lists_the_names(capsys):
    with pytest.raises(SystemExit) as error:
        run_cli(study.main, 'study.py', ['realtive'])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert "No study 'realtive'. There are: prior, layers" in err


def test_every_setting_makes_a_config(cfg, tmp_path):
    for name in study.load(str(study.STUDIES)):
        runs = study.plan(study.load_study(name), cfg, ARGS, tmp_path)
        assert study.load_study(name)['baseline'] in {run.setting for run in runs}
        assert len({run.folder for run in runs}) == len(runs)
        for run in runs:
            Config.fromstring(run.config, '.py')


def test_studies_take_a_deeper_model(tmp_path):
    path = ROOT / 'configs/classification/sp-deit-tiny_1xb128-200e_cifar10.py'
    cfg = Config.fromfile(str(path))
    runs = study.plan(study.load_study('layers'), cfg, ARGS, tmp_path)
    study.check_backbones(runs)
    built = {
        run.setting: study.build_backbone(Config.fromstring(run.config, '.py'))
        for run in runs
    }
    shares = ('none', '1/4', '1/2', '3/4', 'all')
    assert [built[name].num_spsa_layers for name in shares] == [0, 3, 6, 9, 12]
    assert {backbone.cls_token_layer for backbone in built.values()} == {10}


def test_what_does_not_fit_ends_before_a_run_starts(tmp_path, capsys):
    # Three heads: none for a square.
    config = ROOT / 'configs/classification/sp-deit-tiny_1xb128-200e_cifar10.py'
    argv = ['relative', '--config', str(config), '--work-dir', str(tmp_path)]
    with pytest.raises(SystemExit):
        run_cli(study.main, 'study.py', argv)
    err = capsys.readouterr().err
    assert "Setting 'psa' does not fit" in err
    assert '--settings' in err
    with pytest.raises(SystemExit):
        run_cli(study.main, 'study.py', [*argv, '--settings', 'sp_sa'])
    assert 'There are: none, sp-sa, shaw' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_cli(study.main, 'study.py', [*argv, '--baseline', 'nothing'])
    assert '--baseline: no setting nothing. There are: none' in capsys.readouterr().err
    config = tmp_path / 'plain.py'
    config.write_text(
        f"_base_ = '{study.CONFIG}'\n"
        "model = dict(backbone=dict(_delete_=True, type='VisionTransformer'))\n"
    )
    argv = ['relative', '--config', str(config), '--work-dir', str(tmp_path)]
    with pytest.raises(SystemExit):
        run_cli(study.main, 'study.py', argv)
    assert 'is a VisionTransformer' in capsys.readouterr().err
    assert not (tmp_path / 'runs').exists()


def test_chosen_settings_bring_their_baselines():
    low_data = study.load_study('low_data')
    assert list(study.choose(low_data, ['sp-sa 5%'])['settings']) == [
        'none 5%',
        'sp-sa 5%',
    ]
    relative = study.load_study('relative')
    assert list(study.choose(relative, ['psa'])['settings']) == ['none', 'psa']
    training = study.choose(study.load_study('training'), ['prior lr x3'])
    assert list(training['settings']) == ['none', 'sp-sa', 'prior lr x3']


def test_shorthands_of_training(cfg, tmp_path):
    args = argparse.Namespace(seeds=1, val_interval=5, epochs=4)
    runs = study.plan(study.load_study('training'), cfg, args, tmp_path)
    study.check_backbones(runs)
    configs = {run.setting: Config.fromstring(run.config, '.py') for run in runs}
    assert configs['sp-sa, longer'].train_cfg.max_epochs == 12
    assert configs['sp-sa'].train_cfg.max_epochs == 4
    names = [
        transform.type
        for transform in configs['sp-sa, augmented'].train_dataloader.dataset.pipeline
    ]
    plain = [t.type for t in cfg.train_dataloader.dataset.pipeline]
    assert names == [*plain[:-1], 'RandAugment', 'RandomErasing', plain[-1]]
    head = configs['none, larger'].model.head
    assert head.in_channels == configs['none, larger'].model.backbone.arch.embed_dims


def test_studies_share_a_setting(cfg, tmp_path):
    folders = [
        {run.folder for run in study.plan(study.load_study(name), cfg, ARGS, tmp_path)}
        for name in ('relative', 'sharing')
    ]
    assert len(folders[0] & folders[1]) == ARGS.seeds  # SP-SA as it is


@pytest.mark.parametrize('indices', [None, 1000, list(range(1400, 0, -2))])
def test_data_fraction_keeps_the_length_of_an_epoch(cfg, tmp_path, indices):
    if indices is not None:
        cfg.train_dataloader.dataset.indices = indices
    whole = study.build_dataset(cfg.train_dataloader.dataset.to_dict())
    (run,) = study.plan(
        dict(settings={'a': {'data_fraction': 0.1}}),
        cfg,
        argparse.Namespace(seeds=1, val_interval=5, epochs=None),
        tmp_path,
    )
    written = Config.fromfile(str(study.write_config(run)))
    dataset = study.build_dataset(written.train_dataloader.dataset.dataset.to_dict())
    assert written.train_dataloader.dataset.times == 10
    # Every tenth: a folder dataset, sorted by class, keeps all its classes.
    assert len(dataset) == round(len(whole) / 10)
    for i in range(len(dataset)):
        expected = whole.get_data_info(i * len(whole) // len(dataset))
        np.testing.assert_array_equal(dataset.get_data_info(i)['img'], expected['img'])


def test_foreign_folders_are_refused(cfg, tmp_path):
    runs = study.plan(study.load_study('class_token'), cfg, ARGS, tmp_path)
    study.write_config(runs[0])
    study.write_config(runs[0])  # the same again is fine
    with pytest.raises(UserError, match='holds a run of other settings'):
        study.write_config(runs[0]._replace(config=runs[1].config))
    runs[1].folder.mkdir()
    (runs[1].folder / 'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='no run of a study'):
        study.write_config(runs[1])


def test_paired_interval(tmp_path):
    a, b = [90.0, 92.0, 91.0], [91.0, 94.0, 91.5]
    runs = []
    for setting, values in (('a', a), ('b', b)):
        for seed, value in enumerate(values):
            folder = tmp_path / f'{setting}{seed}'
            folder.mkdir()
            curve = {'5': value - 10, '10': value}
            (folder / 'result.json').write_text(json.dumps(curve))
            runs.append(study.Run(setting, seed, folder, ''))
    rows = study.summarize(dict(baseline='a', reach=91), runs)
    diff = np.subtract(b, a)
    low, high = stats.t.interval(0.95, 2, diff.mean(), stats.sem(diff))
    assert rows[1]['difference'] == pytest.approx(diff.mean())
    assert rows[1]['interval'] == pytest.approx((high - low) / 2)
    assert rows[1]['epochs'] == 10
    assert np.isnan(rows[0]['epochs'])  # one seed never gets there
    assert '| b | 92.17 | 1.61 | +1.17 | a |' in study.table(rows)
    rows = study.summarize(dict(baseline='a', against={'b': 'b', 'a': 'b'}), runs)
    assert rows[0]['difference'] == pytest.approx(-diff.mean())
    assert rows[1]['difference'] == 0


def test_a_run_of_another_study_is_waited_for(cfg, tmp_path, monkeypatch):
    run = study.plan(study.load_study('class_token'), cfg, ARGS, tmp_path)[0]
    study.write_config(run)
    other = open(run.folder / 'output.log', 'a')  # noqa: SIM115
    fcntl.flock(other, fcntl.LOCK_EX)
    waited = []

    def finish(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            (run.folder / 'result.json').write_text('{"5": 90.0}')
            other.close()

    monkeypatch.setattr(study.time, 'sleep', finish)
    monkeypatch.setattr(study.subprocess, 'Popen', None)  # it would have to be called
    study.run_all([run], {run.folder: run.folder / 'config.py'}, jobs=1)
    assert len(waited) >= 3


@pytest.mark.slow
def test_a_study_runs_and_does_not_repeat(tmp_path, capsys):
    config = tmp_path / 'few.py'
    config.write_text(
        f"_base_ = '{study.CONFIG}'\n"
        'train_dataloader = dict(dataset=dict(indices=64))\n'
        'default_hooks = dict(checkpoint=dict(interval=1))\n'
    )
    argv = ['class_token', '--config', str(config), '--seeds', '1', '--epochs', '4']
    argv += ['--val-interval', '2', '--work-dir', str(tmp_path / 'runs')]
    study.main(argv)
    out = capsys.readouterr().out
    assert '2 runs, 0 of them finished' in out
    assert '| late |' in out
    study.main(argv)
    assert '2 runs, 2 of them finished' in capsys.readouterr().out
