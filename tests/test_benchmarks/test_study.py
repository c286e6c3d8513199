import argparse

import experiments
import numpy as np
import pytest
import study
from mmengine.config import Config


@pytest.fixture
def cfg():
    return Config.fromfile(str(study.CONFIG))


def plan(name, cfg, seeds=2, epochs=None):
    """The runs of a study, by its name or its content."""
    chosen = study.load_study(name) if isinstance(name, str) else name
    args = argparse.Namespace(val_interval=5, epochs=epochs)
    return study.plan(chosen, study.config_under_study(chosen, cfg, args), seeds)


def test_unknown_study_lists_the_names(capsys):
    with pytest.raises(SystemExit) as error:
        experiments.run_cli(study.main, 'study.py', ['realtive'])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert "No study 'realtive'. There are: prior, layers" in err


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        study.main(['--help'])
    _, options = capsys.readouterr().out.split('  --settings ')
    # --settings, cut off here, has one; --cfg-options has none.
    assert options.count('(default:') == options.count('\n  --')
    assert str(study.CONFIG) in options.replace('\n' + ' ' * 24, '')


def test_every_setting_makes_a_config(cfg):
    for name in study.load(str(study.STUDIES)):
        runs = plan(name, cfg)
        assert study.load_study(name)['baseline'] in {run.setting for run in runs}
        assert len({run.key for run in runs}) == len(runs)
        study.check_backbones(runs)


def image_folder(root, split, classes=2, count=3):
    for name in 'abcdefghij'[:classes]:
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / name / f'{i}.jpg').write_bytes(b'')


@pytest.fixture
def on_files(tmp_path, cfg):
    """A config of two data sets of six images each, not made yet."""
    data = dict(type='CustomDataset', data_root=str(tmp_path), pipeline=[])
    parts = [dict(data, data_prefix='train', indices=range(i, 6, 2)) for i in (0, 1)]
    joint = dict(type='ConcatDataset', datasets=parts, _delete_=True)
    options = {
        'train_dataloader.dataset': joint,
        'val_dataloader.dataset': dict(data, data_prefix='test', _delete_=True),
    }
    return experiments.changed(cfg, options)


def test_missing_images_are_named_before_a_run(tmp_path, on_files):
    with pytest.raises(experiments.UserError, match=r'train_dataloader.*train'):
        study.check_images(on_files)
    image_folder(tmp_path, 'train')
    with pytest.raises(experiments.UserError, match=r'val_dataloader.*/test'):
        study.check_images(on_files)
    image_folder(tmp_path, 'test')
    study.check_images(on_files)
    (tmp_path / 'train/b/2.jpg').unlink()
    match = r'train_dataloader.datasets\[1\].*at least 6 images.* but has 5'
    with pytest.raises(experiments.UserError, match=match):
        study.check_images(on_files)


def test_a_whole_record_needs_no_images(tmp_path, on_files):
    runs = plan('prior', on_files, seeds=1)
    record = experiments.Record(tmp_path / 'record.jsonl', on_files)
    assert not experiments.all_recorded(runs, None)
    for run in runs:
        assert not experiments.all_recorded(runs, record)
        record.add(run, {'curve': {'1': 50.0}, 'tests': {}})
    assert experiments.all_recorded(runs, record)


def test_studies_take_a_deeper_model():
    path = (
        experiments.ROOT / 'configs/classification/sp-deit-tiny_1xb128-200e_cifar10.py'
    )
    runs = plan('layers', Config.fromfile(str(path)))
    study.check_backbones(runs)
    built = {run.setting: study.build_backbone(run.config) for run in runs}
    shares = ('none', '1/4', '1/2', '3/4', 'all')
    assert [built[name].num_spsa_layers for name in shares] == [0, 3, 6, 9, 12]
    assert {backbone.cls_token_layer for backbone in built.values()} == {10}


def test_what_does_not_fit_ends_before_a_run_starts(tmp_path, capsys):
    # Three heads: none for a square.
    config = (
        experiments.ROOT / 'configs/classification/sp-deit-tiny_1xb128-200e_cifar10.py'
    )
    argv = ['relative', '--config', str(config), '--work-dir', str(tmp_path)]
    with pytest.raises(SystemExit):
        experiments.run_cli(study.main, 'study.py', argv)
    err = capsys.readouterr().err
    assert "Setting 'psa' does not fit" in err
    assert '--settings' in err
    with pytest.raises(SystemExit):
        experiments.run_cli(study.main, 'study.py', [*argv, '--settings', 'sp_sa'])
    assert 'There are: none, sp-sa, shaw' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiments.run_cli(study.main, 'study.py', [*argv, '--baseline', 'nothing'])
    assert '--baseline: no setting nothing. There are: none' in capsys.readouterr().err
    config = tmp_path / 'plain.py'
    config.write_text(
        f"_base_ = '{study.CONFIG}'\n"
        "model = dict(backbone=dict(_delete_=True, type='VisionTransformer'))\n"
    )
    argv = ['relative', '--config', str(config), '--work-dir', str(tmp_path)]
    with pytest.raises(SystemExit):
        experiments.run_cli(study.main, 'study.py', argv)
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


def test_shorthands_of_training(cfg):
    runs = plan('training', cfg, seeds=1, epochs=4)
    study.check_backbones(runs)
    configs = {run.setting: run.config for run in runs}
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


def test_studies_share_a_setting(cfg):
    keys = [{run.key for run in plan(name, cfg)} for name in ('relative', 'sharing')]
    assert len(keys[0] & keys[1]) == 2  # SP-SA as it is, two seeds


@pytest.mark.parametrize('indices', [None, 1000, list(range(1400, 0, -2))])
def test_data_fraction_keeps_the_length_of_an_epoch(cfg, indices):
    if indices is not None:
        cfg.train_dataloader.dataset.indices = indices
    whole = study.build_dataset(cfg.train_dataloader.dataset.to_dict())
    (run,) = plan(dict(settings={'a': {'data_fraction': 0.1}}), cfg, seeds=1)
    written = run.config
    dataset = study.build_dataset(written.train_dataloader.dataset.dataset.to_dict())
    assert written.train_dataloader.dataset.times == 10
    # Every tenth: a folder dataset, sorted by class, keeps all its classes.
    assert len(dataset) == round(len(whole) / 10)
    for i in range(len(dataset)):
        expected = whole.get_data_info(i * len(whole) // len(dataset))
        np.testing.assert_array_equal(dataset.get_data_info(i)['img'], expected['img'])


def test_sizes_are_tests_of_every_run(cfg):
    chosen = dict(settings={'a': {}, 'b': {}}, sizes=[[24, 24], [48, 24]])
    for run in plan(chosen, cfg):
        assert list(run.tests.values()) == ['24x24', '48x24']
        tests = run.config.tests
        own = experiments.changed(cfg, tests[1].options)
        assert own.test_dataloader.dataset.pipeline[0].scale == (24, 48)  # w, h


def test_a_factor_of_the_coordinates_is_tuned_on_held_out_images(cfg):
    chosen = dict(
        settings={'a': {}, 'b': {'spsa_share': 0}}, sizes=[[24, 24], [48, 24]]
    )
    cfg.held_out = dict(indices=range(7))
    mini, plain = plan(chosen, cfg, seeds=1)
    assert list(plain.tests.values()) == ['24x24', '48x24']  # nothing to tune
    names = list(mini.tests.values())
    assert len(names) == 2 + 7
    assert not any('24x24,' in name for name in names)
    tests = {test.name: test.options for test in mini.config.tests}
    own = experiments.changed(cfg, tests['held out, 48x24, 1'])
    assert own.coords_factor == pytest.approx(0.5**0.5, abs=1e-3)
    assert own.test_dataloader.dataset.indices == range(7)
    own = experiments.changed(cfg, tests['48x24, -0.5'])
    assert own.coords_factor == pytest.approx(2**0.25, abs=1e-3)
    assert own.test_dataloader.dataset.get('indices') is None

    accuracy = dict.fromkeys(names, 50.0)
    accuracy.update({'held out, 48x24, 0.5': 60.0, '48x24, 0.5': 40.0, '48x24': 45.0})
    tuned = study.tuned_metrics({k: {study.ACCURACY: v} for k, v in accuracy.items()})
    assert tuned == {'24x24': 50.0, '48x24': 40.0}  # what held-out images say
    accuracy['held out, 48x24, 0.5'] = 50.0
    tuned = study.tuned_metrics({k: {study.ACCURACY: v} for k, v in accuracy.items()})
    assert tuned == {'24x24': 50.0, '48x24': 45.0}


def test_summary_counts_the_epochs():
    runs, results = [], []
    for setting, values in (('a', [90.0, 92.0, 91.0]), ('b', [91.0, 94.0, 91.5])):
        for seed, value in enumerate(values):
            runs.append(experiments.Run(setting, seed, '', '', {}, 'acc'))
            results.append({'curve': {'5': value - 10, '10': value}, 'tests': {}})
    rows = study.summarize(dict(baseline='a', reach=91), runs, results)
    assert rows[1]['difference'] == pytest.approx(np.mean([1.0, 2.0, 0.5]))
    assert rows[1]['epochs'] == 10
    assert np.isnan(rows[0]['epochs'])  # one seed never gets there
    assert study.table(rows).splitlines()[2].endswith('| not in every seed |')
    against = dict(baseline='a', against={'b': 'b', 'a': 'b'})
    rows = study.summarize(against, runs, results)
    assert [row['against'] for row in rows] == ['b', 'b']


@pytest.mark.slow
def test_a_study_runs_and_does_not_repeat(tmp_path, capsys, monkeypatch):
    studies = tmp_path / 'studies.yml'
    studies.write_text(
        'token:\n  claim: Late is better.\n  baseline: early\n  sizes: [[48, 24]]\n'
        '  settings: {early: {backbone.cls_token_layer: 0}, late: {}}\n'
    )
    monkeypatch.setattr(study, 'STUDIES', studies)
    config = tmp_path / 'few.py'
    config.write_text(
        f"_base_ = '{study.CONFIG}'\n"
        'train_dataloader = dict(dataset=dict(indices=64))\n'
        'default_hooks = dict(checkpoint=dict(interval=1))\n'
    )
    argv = ['token', '--config', str(config), '--seeds', '1', '--epochs', '4']
    argv += ['--val-interval', '2', '--record', str(tmp_path / 'record.jsonl')]
    study.main([*argv, '--work-dir', str(tmp_path / 'runs')])
    first = capsys.readouterr().out
    assert '2 runs, 0 of them finished' in first
    assert '| late |' in first
    assert '| setting, tested at | 48x24 |' in first
    # What is written is a study's own: elsewhere nothing is run again.
    monkeypatch.setattr(experiments, '_start', None)
    study.main([*argv, '--work-dir', str(tmp_path / 'fresh')])
    second = capsys.readouterr().out
    assert '2 runs, 2 of them finished' in second
    tables = [
        text[text.index('token: ') : text.index('Written')] for text in (first, second)
    ]
    assert tables[0] == tables[1]
    name = 'token_few/tests.csv'
    rows = (tmp_path / 'runs' / name).read_text()
    assert rows == (tmp_path / 'fresh' / name).read_text()
    assert len(rows.splitlines()) == 3
    for more, differs in (
        (['--epochs', '5'], 'max_epochs: 4 there, 5 here'),
        (
            ['--cfg-options', 'optim_wrapper.optimizer.lr=0.5'],
            'optimizer.lr: .*, 0.5 here',
        ),
    ):
        with pytest.raises(study.UserError, match=differs):
            study.main([*argv, *more, '--work-dir', str(tmp_path / 'runs')])
