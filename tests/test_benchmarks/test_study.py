import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from scipy import stats

from spvit_mm.engine import UserError, launch

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
        launch.run_cli(study.main, 'study.py', ['realtive'])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert "No study 'realtive'. There are: prior, layers" in err


def test_every_setting_makes_a_config(cfg, tmp_path):
    for name in study.load(str(study.STUDIES)):
        runs = study.plan(study.load_study(name), cfg, ARGS, tmp_path / name)
        assert study.load_study(name)['baseline'] in {run.setting for run in runs}
        texts = {study.write_config(run, cfg).read_text() for run in runs}
        assert len(texts) == len(runs)
        for text in texts:
            Config.fromstring(text, '.py')


def test_data_fraction_keeps_the_length_of_an_epoch(cfg, tmp_path):
    (run,) = study.plan(
        dict(settings={'a': {'data_fraction': 0.1}}),
        cfg,
        argparse.Namespace(seeds=1, val_interval=5, epochs=None),
        tmp_path,
    )
    written = Config.fromfile(str(study.write_config(run, cfg)))
    dataset = study.build_dataset(written.train_dataloader.dataset.dataset.to_dict())
    assert len(dataset) == 144
    assert written.train_dataloader.dataset.times == 10


def test_foreign_folders_are_refused(cfg, tmp_path):
    runs = study.plan(study.load_study('class_token'), cfg, ARGS, tmp_path)
    study.write_config(runs[0], cfg)
    study.write_config(runs[0], cfg)  # the same again is fine
    other = runs[0]._replace(overrides={**runs[0].overrides, 'randomness.seed': 9})
    with pytest.raises(UserError, match='holds a run of other settings'):
        study.write_config(other, cfg)
    runs[1].folder.mkdir()
    (runs[1].folder / 'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='no run of a study'):
        study.write_config(runs[1], cfg)


def test_paired_interval(tmp_path):
    a, b = [90.0, 92.0, 91.0], [91.0, 94.0, 91.5]
    runs = []
    for setting, values in (('a', a), ('b', b)):
        for seed, value in enumerate(values):
            folder = tmp_path / f'{setting}{seed}'
            folder.mkdir()
            curve = {'5': value - 10, '10': value}
            (folder / 'result.json').write_text(json.dumps(curve))
            runs.append(study.Run(setting, seed, folder, {}))
    rows = study.summarize(dict(baseline='a', reach=91), runs)
    diff = np.subtract(b, a)
    low, high = stats.t.interval(0.95, 2, diff.mean(), stats.sem(diff))
    assert rows[1]['difference'] == pytest.approx(diff.mean())
    assert rows[1]['interval'] == pytest.approx((high - low) / 2)
    assert rows[1]['epochs'] == 10
    assert np.isnan(rows[0]['epochs'])  # one seed never gets there
    assert '| b | 92.17 |' in study.table(rows, 'a')


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
