import fcntl
import json
import multiprocessing
import subprocess
import sys

import experiments
import numpy as np
import pytest
import torch
from experiments import Record, Run, make_run, run_all
from mmengine.config import Config

from spvit_mm.utils import UserError

CONFIG = experiments.ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'


@pytest.fixture
def cfg():
    return Config.fromfile(str(CONFIG))


def result_of(value, **tests):
    named = {key: {'name': key, 'accuracy/top1': x} for key, x in tests.items()}
    return {'curve': {'5': value - 1, '10': value}, 'tests': named, 'torch': '2'}


def run_of(setting='a', seed=0, key=None, tests=()):
    key = key or f'{setting}-{seed}'
    return Run(
        setting, seed, key, Config(dict(x=1)), dict.fromkeys(tests, 'name'), 'acc'
    )


# --- what a run is


def test_key_is_of_what_is_trained(cfg):
    key = make_run('a', 0, cfg, {}).key
    assert make_run('b', 0, cfg, {}, {'large': {'x': 1}}).key == key
    assert make_run('a', 1, cfg, {}).key != key
    assert make_run('a', 0, cfg, {'optim_wrapper.optimizer.lr': 1e-4}).key != key
    assert make_run('a', 0, cfg, {'model.backbone.num_spsa_layers': 2}).key != key
    elsewhere = {
        'train_dataloader.num_workers': 8,
        'train_dataloader.persistent_workers': True,
        'default_hooks.checkpoint.interval': 7,
        'work_dir': '/scratch',
        'train_pipeline': None,
    }
    assert make_run('a', 0, cfg, elsewhere).key == key


def test_key_follows_the_data_and_not_its_place(cfg):
    def key(root):
        return make_run('a', 0, cfg, {'train_dataloader.dataset.data_root': root}).key

    assert key('data/cifar10/') == key('/home/me/cifar10') != key('data/cifar100')


def test_changed_merges_or_replaces(cfg):
    prior = experiments.changed(
        cfg, {'model.backbone.prior': {'hidden_dims': 8}}
    ).model.backbone.prior
    assert prior == dict(type='MLPSpatialPrior', init='local', hidden_dims=8)
    options = {'model.backbone.prior': {'_delete_': True, 'type': 'X'}}
    for _ in range(2):  # what is given is not changed
        own = experiments.changed(cfg, options)
        assert own.model.backbone.prior == {'type': 'X'}
    assert cfg.model.backbone.prior.init == 'local'


def test_image_folders_are_named(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(UserError, match=r'--data.*train/CLASS.*and val/CLASS.*got'):
        experiments.check_image_folders('--data', tmp_path, 'train', 'val')
    (tmp_path / 'val').mkdir()
    experiments.check_image_folders('--data', tmp_path, 'train', 'val')


# --- the record


def test_record_keeps_curves_and_tests(cfg, tmp_path):
    path = tmp_path / 'docs' / 'record.jsonl'
    Record(path, cfg, metric='acc').add(run_of(), result_of(90.0, small=80.0))
    (line,) = Record(path, cfg, metric='acc').read()
    assert line['curve'] == {'5': 89.0, '10': 90.0}
    assert line['tests']['small']['accuracy/top1'] == 80.0


def test_record_holds_a_run_once_and_its_later_tests(cfg, tmp_path):
    record = Record(tmp_path / 'record.jsonl', cfg)
    for _ in range(2):
        record.add(run_of(tests=['x']), result_of(90.0, x=1.0))
    record.add(run_of(tests=['x', 'y']), result_of(90.0, x=1.0, y=2.0))
    record.add(run_of('b'), result_of(91.0))
    assert len(record.path.read_text().splitlines()) == 1 + 3
    first, second = record.read()
    assert (set(first['tests']), second['setting']) == ({'x', 'y'}, 'b')


def test_record_of_another_protocol_is_refused(cfg, tmp_path):
    path = tmp_path / 'record.jsonl'
    Record(path, cfg).add(run_of(), result_of(90.0))
    other = experiments.changed(cfg, {'train_cfg.max_epochs': 3})
    with pytest.raises(UserError, match='train_cfg.max_epochs: 50 there, 3 here'):
        Record(path, other)
    # seeds, and where and how the data is read, are no protocol
    Record(path, experiments.changed(cfg, {'randomness.seed': 7}))
    Record(path, experiments.changed(cfg, {'train_dataloader.num_workers': 7}))
    mixed = tmp_path / 'mixed.jsonl'
    Record(mixed, other).add(run_of('b'), result_of(90.0))
    mixed.write_text(path.read_text() + mixed.read_text())
    with pytest.raises(UserError, match='another protocol'):
        Record(mixed, cfg)


def test_records_of_two_machines_are_put_together(cfg, tmp_path):
    paths = tmp_path / 'one.jsonl', tmp_path / 'two.jsonl'
    for path, setting in zip(paths, 'ab', strict=True):
        Record(path, cfg).add(run_of(setting), result_of(90.0))
    both = tmp_path / 'both.jsonl'
    both.write_text(paths[0].read_text() + paths[1].read_text())
    assert [x['setting'] for x in Record(both, cfg).read()] == ['a', 'b']


def test_setting_of_another_meaning_is_refused(cfg, tmp_path):
    record = Record(tmp_path / 'record.jsonl', cfg)
    record.add(run_of(key='old'), result_of(90.0))
    with pytest.raises(UserError, match="another training under the name of 'a'"):
        run_all([run_of(key='new')], tmp_path, 1, record)


@pytest.mark.parametrize('text', ['{"setting": "a"}\n', 'a,b\n1,2\n', '[1]\n'])
def test_files_that_are_no_record_are_refused(cfg, tmp_path, text):
    path = tmp_path / 'results.csv'
    path.write_text(text)
    with pytest.raises(UserError, match='line 1: no record'):
        Record(path, cfg)


def test_unfinished_last_line_is_replaced(cfg, tmp_path):
    record = Record(tmp_path / 'record.jsonl', cfg)
    record.add(run_of('a'), result_of(90.0))
    with record.path.open('a') as file:
        file.write('{"setting": "b", "seed": 0, "ke')
    assert len(record.read()) == 1
    record.add(run_of('c'), result_of(91.0))
    assert [line['setting'] for line in record.read()] == ['a', 'c']
    # an editor took the end of the last line, and not its result
    record.path.write_text(record.path.read_text().rstrip('\n'))
    assert [line['setting'] for line in record.read()] == ['a', 'c']
    record.add(run_of('d'), result_of(92.0))
    assert [line['setting'] for line in record.read()] == ['a', 'c', 'd']
    # killed with the first line
    record.path.write_text('{"protocol": {')
    record.add(run_of('a'), result_of(90.0))
    assert len(record.read()) == 1


def _add_many(path, name):
    record = Record(path, Config.fromfile(str(CONFIG)))
    for seed in range(20):
        record.add(run_of(name, seed), result_of(90.0))


def test_processes_share_a_record(cfg, tmp_path):
    path = tmp_path / 'record.jsonl'
    context = multiprocessing.get_context('fork')
    workers = [context.Process(target=_add_many, args=(path, n)) for n in 'abc']
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Record(path, cfg).read()) == 60


# --- doing the runs

TRAINER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with open(folder.parent / 'started', 'a') as file:
    file.write(folder.name + '\\n')
time.sleep(0.7)
if sys.argv[2] == 'fails':
    sys.exit('out of luck')
logs = folder / 'now' / 'vis_data'
logs.mkdir(parents=True)
(logs / 'scalars.json').write_text(json.dumps({'acc': 90.0, 'step': 5}) + '\\n')
"""


@pytest.fixture
def trainer(monkeypatch):
    """Trainings of no time; those of a setting 'fails' do."""

    def start(run, folder, log):
        command = [sys.executable, '-c', TRAINER, str(folder), run.setting]
        return subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(experiments, '_start', start)


def started(work_dir):
    return (work_dir / 'runs' / 'started').read_text().split()


def test_run_is_done_once(cfg, tmp_path, trainer, capsys):
    runs = [run_of('a', key='1'), run_of('b', key='2'), run_of('alias', key='1')]
    record = Record(tmp_path / 'record.jsonl', cfg)
    results = run_all(runs, tmp_path, 2, record)
    assert [result['curve'] for result in results] == [{'5': 90.0}] * 3
    assert sorted(started(tmp_path)) == ['1', '2']
    assert [x['setting'] for x in record.read()][2:] == ['alias']
    # neither where the runs are, nor from the record alone
    run_all(runs, tmp_path, 2)
    assert '3 runs, 3 of them finished before' in capsys.readouterr().out
    fresh = run_all(runs, tmp_path / 'fresh', 2, record)
    assert [x['curve'] for x in fresh] == [{'5': 90.0}] * 3
    assert not (tmp_path / 'fresh').exists()
    assert sorted(started(tmp_path)) == ['1', '2']


def test_two_studies_do_not_train_a_run_twice(tmp_path, trainer):
    runs = [run_of('a', seed) for seed in range(4)]
    context = multiprocessing.get_context('fork')
    orders = (runs, runs[::-1])
    workers = [context.Process(target=run_all, args=(x, tmp_path, 2)) for x in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(started(tmp_path)) == sorted(run.key for run in runs)


def test_failed_run_is_named(tmp_path, trainer):
    with pytest.raises(UserError, match='ended with code 1, .*output.log with: out of'):
        run_all([run_of('fails')], tmp_path, 1)
    assert not (tmp_path / 'runs' / 'fails-0' / 'result.json').exists()


def test_foreign_folder_is_refused_before_a_run_starts(tmp_path, trainer):
    runs = [run_of('a'), run_of('b')]
    folder = tmp_path / 'runs' / runs[1].key
    folder.mkdir(parents=True)
    (folder / 'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='no run of a study'):
        run_all(runs, tmp_path, 1)
    assert not (tmp_path / 'runs' / 'started').exists()


def test_run_of_another_study_is_waited_for(tmp_path, monkeypatch):
    run = run_of()
    folder = tmp_path / 'runs' / run.key
    folder.mkdir(parents=True)
    other = open(folder / 'output.log', 'a')  # noqa: SIM115
    fcntl.flock(other, fcntl.LOCK_EX)
    waited = []

    def finish(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            experiments.write_result(folder, result_of(90.0))
            other.close()

    monkeypatch.setattr(experiments.time, 'sleep', finish)
    monkeypatch.setattr(experiments, '_start', None)  # it would have to be called
    (result,) = run_all([run], tmp_path, 1)
    assert len(waited) >= 3
    assert experiments.final(result) == 90.0


def test_training_is_resumed_and_then_tested(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        experiments.subprocess, 'Popen', lambda command, **_: commands.append(command)
    )
    run = run_of(tests=['x'])
    with open(tmp_path / 'log', 'w') as log:
        experiments._start(run, tmp_path, log)
        (tmp_path / 'last_checkpoint').write_text('epoch_3.pth')
        experiments._start(run, tmp_path, log)
        experiments.write_result(tmp_path, result_of(90.0))
        experiments._start(run, tmp_path, log)
    scripts = [command[1].rsplit('/')[-1] for command in commands]
    assert scripts == ['train.py', 'train.py', 'experiments.py']
    assert ['--resume' in command for command in commands] == [False, True, False]
    assert (tmp_path / 'config.py').read_text() == 'x = 1\n'


# --- testing


@pytest.fixture
def checkpoint(cfg, tmp_path):
    """A model that was not trained."""
    model = experiments.build_model(cfg)
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    (tmp_path / 'last_checkpoint').write_text(f'/where/it/was/{path.name}')
    return path


def test_evaluation_follows_the_predictions(cfg, checkpoint):
    metrics = experiments.evaluate(cfg, checkpoint)
    model = experiments.load_trained(cfg, checkpoint)
    loader = experiments.Runner.build_dataloader(cfg.test_dataloader)
    right = [
        sample.pred_label.item() == sample.gt_label.item()
        for batch in loader
        for sample in model.test_step(batch)
    ]
    assert len(right) == 360
    assert metrics['accuracy/top1'] == pytest.approx(100 * np.mean(right), abs=1e-4)


def test_weights_must_fit(cfg, checkpoint):
    # Only the training grid is new, and the config knows it.
    scaled = experiments.changed(cfg, {'model.backbone.prior.coords': 'scaled'})
    experiments.load_trained(scaled, checkpoint)
    for options in (
        {'model.backbone.num_spsa_layers': 0},
        {'model.backbone.with_peg': True},
    ):
        with pytest.raises(UserError, match='does not fit the model'):
            experiments.load_trained(experiments.changed(cfg, options), checkpoint)


def test_a_factor_multiplies_all_coordinates(cfg):
    """Half the coordinates of twice the grid are those of 'scaled'."""
    models = []
    for coords in ('raw', 'scaled'):
        torch.manual_seed(0)
        options = {'model.backbone.prior.coords': coords}
        model = experiments.build_model(experiments.changed(cfg, options)).eval()
        models.append(model.double())
    x = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    raw, scaled = (model(x) for model in models)
    assert (raw - scaled).abs().max() > 1e-6
    experiments.rescale_coords(models[0], 0.5)
    torch.testing.assert_close(models[0](x), scaled)


def test_only_missing_tests_are_done(cfg, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiments,
        'evaluate',
        lambda own, path: {'lr': own.test_dataloader.batch_size},
    )
    sizes = [{'test_dataloader.batch_size': n} for n in (3, 4)]
    run = make_run('a', 0, cfg, {}, {'three': sizes[0], 'four': sizes[1]})
    (tmp_path / 'config.py').write_text(run.config.pretty_text)
    known = {experiments.digest(sizes[0]): {'name': 'three', 'lr': 0.5}}
    experiments.write_result(tmp_path, {'curve': {}, 'tests': known})
    experiments.run_tests(tmp_path)
    result = experiments.read_result(tmp_path)
    assert experiments.is_complete(result, run)
    found = experiments.tested(result, run)
    assert (found['three']['lr'], found['four']['lr']) == (0.5, 4)


def test_resized_images_have_the_size(cfg):
    options = experiments.resized(cfg, (16, 40))
    own = experiments.changed(cfg, options)
    loader = experiments.Runner.build_dataloader(own.test_dataloader)
    assert next(iter(loader))['inputs'][0].shape == (3, 16, 40)
    types = [t.type for t in own.test_dataloader.dataset.pipeline]
    assert types == ['Resize', 'PackInputs']


def test_result_is_whole(tmp_path):
    experiments.write_result(tmp_path, result_of(90.0))
    assert json.loads((tmp_path / 'result.json').read_text()) == result_of(90.0)
    assert [path.name for path in tmp_path.iterdir()] == ['result.json']
