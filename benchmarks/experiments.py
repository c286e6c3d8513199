"""What the studies share: runs, each trained and tested once, and their record.

A *run* is one training of a config and, after it, tests of the trained model: the same
weights under other settings, such as images of another size. It is known by a key, a
digest of all that decides its result, so studies that train the same share the run, on
every machine. Runs live in ``WORK_DIR/runs/KEY``: the config, checkpoints, logs and
``result.json``. What is there is not done again: a killed training goes on from its
last checkpoint, a run that was tested at some sizes is tested at the others. Several
processes may work on one folder; no run is trained twice at once.

A *record* is a file for git: one JSON line per run, under a first line with the
protocol, which is what its runs have in common. A run that it holds is not trained
again. Lines of two machines may be put one after another.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import write_text
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.runner import CheckpointLoader, Runner

# The scripts take these from here.
from spvit_mm.apis import (  # noqa: F401
    ArgumentParser,
    build_model,
    check_entries,
    check_finite,
    load_config,
    number,
    run_cli,
)
from spvit_mm.utils import UserError, check_new_file, check_new_folder

ROOT = Path(__file__).resolve().parents[1]
ACCURACY = 'accuracy/top1'

# The entries of a config that decide what a training ends with and what is measured.
DECISIVE = (
    'model',
    'data_preprocessor',
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'custom_hooks',
    'load_from',
    'randomness',
    'val_dataloader',
    'val_evaluator',
)
# Of these, what differs between machines: who loads the data, and where it lies.
LOADING = ('num_workers', 'persistent_workers', 'pin_memory')
PLACES = ('data_root', 'label_root')


class Run(NamedTuple):
    """One training and the tests after it.

    Attributes:
        setting (str): Name of the setting.
        seed (int): Random seed.
        key (str): Digest of what is trained.
        config (Config): The config, its tests as the entry ``tests``.
        tests (dict): Name of each test by its own key.
        metric (str): What validation measures: a value of each epoch is kept.
    """

    setting: str
    seed: int
    key: str
    config: Config
    tests: dict
    metric: str


# --- what a run is


def changed(cfg: Config, options: dict) -> Config:
    """A copy of a config with other values of dotted names.

    As in a config file, a dict is merged into the one that is there, unless it has
    ``_delete_=True``.
    """
    own = deepcopy(cfg)
    for name, value in deepcopy(options).items():
        if isinstance(value, dict) and value.pop('_delete_', False):
            *path, last = name.split('.')
            parent = own
            for part in path:
                parent = parent[part]
            parent[last] = value
        else:
            own.merge_from_dict({name: value})
    return own


def decisive(value, name: str = ''):
    """What decides a result, of a config or a part of it: alike on every machine."""
    if isinstance(value, dict):
        return {k: decisive(v, k) for k, v in value.items() if k not in LOADING}
    if isinstance(value, (list, tuple)):
        return [decisive(x) for x in value]
    return Path(value).name if name in PLACES and value else value


def digest(value) -> str:
    """A name for a value of dicts, lists, numbers and strings."""
    text = json.dumps(decisive(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trained(cfg: Config) -> dict:
    """The entries of a config that decide its training."""
    return {k: cfg[k] for k in DECISIVE if cfg.get(k) is not None}


def make_run(
    setting: str,
    seed: int,
    cfg: Config,
    options: dict,
    tests: dict | None = None,
    metric: str = ACCURACY,
) -> Run:
    """The run of a setting.

    Args:
        setting (str): Its name.
        seed (int): Random seed.
        cfg (Config): The config under study.
        options (dict): What the setting changes, see :func:`changed`.
        tests (dict, optional): By name, what each test changes of the trained config:
            the model, ``test_dataloader``, ``test_evaluator``. Defaults to none.
        metric (str): What validation measures. Defaults to the top-1 accuracy.
    """
    own = changed(cfg, {**options, 'randomness.seed': seed})
    key = digest(trained(own))
    names = {digest(x): name for name, x in (tests or {}).items()}
    if tests:
        own.tests = [dict(name=name, options=x) for name, x in tests.items()]
    return Run(setting, seed, key, own, names, metric)


def resized(cfg: Config, size: tuple[int, int]) -> dict:
    """The options of a test of classified images at another size (h, w)."""
    loader = deepcopy(cfg.test_dataloader)
    *pipeline, pack = loader.dataset.pipeline
    pipeline = [transform for transform in pipeline if transform.type != 'Resize']
    resize = dict(type='Resize', scale=size[::-1], interpolation='bicubic')
    return {
        'test_dataloader.batch_size': min(loader.batch_size, 64),
        'test_dataloader.dataset.pipeline': [*pipeline, resize, pack],
    }


def rescale_coords(model: torch.nn.Module, factor: float) -> None:
    """Multiply the coordinates that every attention of a SPViT sees by a factor."""

    for layer in model.backbone.layers:
        # Tokens, grid and omega stay; the last argument is `rescale`.
        layer.register_forward_pre_hook(
            lambda _, args: (*args[:3], args[0].new_full((2,), factor))
        )


def check_image_folders(option: str, root, *splits: str) -> None:
    """A folder of images without one of its splits is a UserError."""
    if root is None or not all((Path(root) / name).is_dir() for name in splits):
        wanted = ' and '.join(f'{name}/CLASS/*.jpg' for name in splits)
        raise UserError(f'{option} must be a folder with {wanted}, got {root}.')


# --- what a run has left


def read_result(folder: Path) -> dict | None:
    """The result of the run in a folder, None before its training has ended."""
    path = folder / 'result.json'
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, result: dict) -> None:
    write_text(folder / 'result.json', json.dumps(result))


def is_complete(result: dict | None, run: Run) -> bool:
    """Whether a run is trained and has had all its tests."""
    return result is not None and set(run.tests) <= set(result['tests'])


def all_recorded(runs: list[Run], record: Record | None) -> bool:
    """Whether a record holds every run and its tests, so that nothing is trained."""
    known = {} if record is None else {x['key']: x for x in record.read()}
    return all(is_complete(known.get(run.key), run) for run in runs)


def read_curve(folder: Path, metric: str) -> dict[str, float]:
    """A metric by step, from the logs of a training and all its resumptions."""
    curve = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if metric in entry:
                curve[str(entry['step'])] = entry[metric]
    return curve


def final(result: dict) -> float:
    """The metric at the end of training."""
    return result['curve'][max(result['curve'], key=int)]


def tested(result: dict, run: Run) -> dict[str, dict]:
    """The metrics of a run's tests by the tests' names."""
    return {name: result['tests'][key] for key, name in run.tests.items()}


class Record:
    """The results of one protocol, in a file that can be committed.

    Args:
        path (Path): The file, JSON lines. A new one is begun with the first result.
        cfg (Config): The config under study, before any setting changes it.
        **protocol: What else all runs have in common.

    Raises:
        UserError: If the file holds something else, or results of another protocol,
            whose differences are named.
    """

    def __init__(self, path: Path, cfg: Config, **protocol) -> None:
        self.path = Path(path)
        self.protocol = {**protocol, **_flat(decisive(trained(cfg)))}
        self.protocol.pop('randomness.seed', None)
        self.read()

    def read(self) -> list[dict]:
        """All results; those of one run and its later tests are put together.

        A last line that a killed process has not finished is left out.
        """
        results = {}
        text = self.path.read_text() if self.path.exists() else ''
        *lines, last = text.split('\n')
        for index, line in enumerate([*lines, last] if _is_json(last) else lines):
            try:
                line = json.loads(line)
                if index == 0 or 'protocol' in line:
                    self._compare(line['protocol'])
                    continue
                name = (line['setting'], line['seed'])
                known = results.setdefault(name, line)
                same, tests = known['key'] == line['key'], line['tests']
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f'{self.path}, line {index + 1}: no record of results.'
                ) from error
            if not same:
                raise UserError(
                    f'{self.path} holds two trainings of {name[0]!r}, seed {name[1]}.'
                )
            known['tests'].update(tests)
        return list(results.values())

    def _compare(self, there: dict) -> None:
        mine = self.protocol
        differing = [k for k in {**there, **mine} if there.get(k) != mine.get(k)]
        if differing:
            listed = '; '.join(
                f'{k}: {there.get(k)} there, {mine.get(k)} here' for k in differing[:5]
            )
            raise UserError(
                f'{self.path} holds results of another protocol, which are not to be '
                f'mixed ({listed}). Give another --record.'
            )

    def check(self, runs: list[Run]) -> None:
        """A setting that was recorded under another meaning is a UserError."""
        keys = {(line['setting'], line['seed']): line['key'] for line in self.read()}
        for run in runs:
            if keys.get((run.setting, run.seed), run.key) != run.key:
                raise UserError(
                    f'{self.path} holds another training under the name of '
                    f'{run.setting!r}. Give the setting another name, or remove its '
                    'lines there.'
                )

    def add(self, run: Run, result: dict) -> None:
        """Append a result, unless it is there; whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'ab+') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            whole = text.rfind(b'\n') + 1
            if _is_json(text[whole:]):  # an editor has taken the end of the line
                whole = file.write(b'\n')
            else:
                file.truncate(whole)
            file.flush()
            known = {(x['setting'], x['seed']): x for x in self.read()}
            if is_complete(known.get((run.setting, run.seed)), run):
                return
            line = {'setting': run.setting, 'seed': run.seed, 'key': run.key, **result}
            lines = [line] if whole else [{'protocol': self.protocol}, line]
            try:
                file.write(''.join(json.dumps(x) + '\n' for x in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise UserError(
                    f'{self.path} cannot be written: {error.strerror}. The result is in '
                    'the run of --work-dir: the same command goes on from there.'
                ) from error


def _is_json(text: str | bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _flat(entries: dict, prefix: str = '') -> dict[str, str]:
    """Nested dicts as dotted names, long values as a digest."""
    flat = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f'{prefix}{name}.'))
        else:
            text = json.dumps(value, default=str)
            short = text if len(text) < 400 else f'{text[:60]} ... {digest(value)}'
            flat[prefix + name] = short
    return flat


# --- doing the runs


def add_run_options(parser: argparse.ArgumentParser, work_dir: str, seeds: int) -> None:
    """Add the options that all studies have."""
    parser.add_argument(
        '--seeds',
        type=number(1),
        default=seeds,
        help='seeds 0, 1, ... (default: %(default)s)',
    )
    parser.add_argument(
        '--jobs',
        type=number(1),
        default=2,
        help='runs side by side (default: %(default)s)',
    )
    parser.add_argument(
        '--work-dir',
        default=work_dir,
        help='where runs and results go (default: %(default)s)',
    )
    parser.add_argument(
        '--record',
        metavar='FILE',
        help='results to keep, as JSON lines; a run that is there is not repeated '
        '(default: none)',
    )


def open_record(args, cfg: Config, **protocol) -> Record | None:
    """The record that the options name, if any."""
    return Record(args.record, cfg, **protocol) if args.record else None


def check_run_options(args) -> None:
    """A place that cannot be written to is a UserError."""
    args.work_dir = Path(check_new_folder(args.work_dir))
    if args.record is not None:
        args.record = Path(check_new_file(args.record, force=True))


def run_all(
    runs: list[Run], work_dir: Path, jobs: int, record: Record | None = None
) -> list[dict]:
    """Do what is not finished, some runs side by side.

    Args:
        runs (list[Run]): The runs, in the order in which to do them.
        work_dir (Path): Where the runs are.
        jobs (int): Processes at a time.
        record (Record, optional): Where to look for results and to add new ones.

    Returns:
        list[dict]: The result of each run: ``curve``, the metric by step, and
        ``tests``, the metrics of each test by its key.

    Raises:
        UserError: If a folder is not that of a run, or a run fails.
    """
    folders = {run.key: Path(work_dir) / 'runs' / run.key for run in runs}
    results = {}
    if record is not None:
        record.check(runs)
        results = {x['key']: x for x in record.read()}
    todo = {}
    for run in runs:
        if is_complete(results.get(run.key), run):
            continue
        found = read_result(folders[run.key])
        if is_complete(found, run):
            results[run.key] = found
        else:
            todo.setdefault(run.key, run)
    finished = sum(run.key not in todo for run in runs)
    print(f'{len(runs)} runs, {finished} of them finished before.', flush=True)
    for run in todo.values():
        make_folder(folders[run.key])

    start, done = time.time(), 0

    def finish(run: Run, result: dict) -> None:
        nonlocal done
        done += 1
        results[run.key] = result
        if record is not None:
            record.add(run, result)
        left = (time.time() - start) / done * (len(todo) - done) / 60
        got = f'{final(result):.2f} %' if result['curve'] else 'trained'
        got += f', {len(run.tests)} tests' if run.tests else ''
        print(
            f'[{done}/{len(todo)}] {run.setting} seed {run.seed}: {got}, '
            f'about {left:.0f} min left',
            flush=True,
        )

    _work_off(list(todo.values()), folders, jobs, finish)
    if record is not None:
        for run in runs:
            record.add(run, results[run.key])
    return [results[run.key] for run in runs]


def make_folder(folder: Path) -> None:
    """Make the folder of a run; one of something else is a UserError."""
    known = ('output.log', 'config.py')
    foreign = not any((folder / name).exists() for name in known)
    if folder.exists() and any(folder.iterdir()) and foreign:
        raise UserError(
            f'{folder} is not empty and no run of a study. Give another --work-dir.'
        )
    folder.mkdir(parents=True, exist_ok=True)


def _work_off(queue: list[Run], folders: dict, jobs: int, finish) -> None:
    """Start processes for the runs' trainings and tests until nothing is left."""
    # Terminated, it takes its processes along: they would go on, and unseen.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    active = {}

    def go_on(run: Run, log) -> None:
        result = read_result(folders[run.key])
        if is_complete(result, run):
            log.close()
            finish(run, result)
        else:
            active[_start(run, folders[run.key], log)] = (run, log)

    try:
        while queue or active:
            while queue and len(active) < jobs:
                run = queue.pop(0)
                log = open(folders[run.key] / 'output.log', 'a')  # noqa: SIM115
                try:
                    # The processes inherit it, and keep it should this one die.
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Another study is at it just now, so look again later.
                    log.close()
                    queue.append(run)
                    break
                go_on(run, log)
            time.sleep(0.5)
            for process in [p for p in active if p.poll() is not None]:
                run, log = active.pop(process)
                folder = folders[run.key]
                if process.returncode:
                    log.close()
                    raise UserError(
                        f'The run {folder} ended with code {process.returncode}, '
                        f'{log.name} with: {_last_line(Path(log.name))}'
                    )
                if read_result(folder) is None:
                    curve = read_curve(folder, run.metric)
                    result = {'curve': curve, 'tests': {}, 'torch': torch.__version__}
                    write_result(folder, result)
                go_on(run, log)
    finally:
        for process, (_, log) in active.items():
            process.terminate()
            process.wait()
            log.close()


def _last_line(path: Path) -> str:
    return (path.read_text().strip().splitlines() or ['nothing'])[-1]


def _start(run: Run, folder: Path, log) -> subprocess.Popen:
    """The next process of a run whose folder is locked: its training, or its tests."""
    config = folder / 'config.py'
    write_text(config, run.config.pretty_text)
    if read_result(folder) is None:
        command = [str(ROOT / 'tools/train.py'), str(config), '--work-dir', str(folder)]
        if (folder / 'last_checkpoint').exists():
            command.append('--resume')
    else:
        command = [__file__, str(folder)]
    # One thread each: the tensors are too small to share among threads.
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=env)


# --- testing, in a process of its own


def last_checkpoint(folder: Path) -> Path:
    """The last checkpoint of a run, whose folder may have been moved."""
    return folder / Path((folder / 'last_checkpoint').read_text().strip()).name


def load_trained(cfg: Config, checkpoint: Path) -> torch.nn.Module:
    """A model with trained weights, in evaluation mode.

    Raises:
        UserError: If any parameter is left out. A buffer that the checkpoint lacks
            (the training grid of a prior with another rule) has its value from the
            config.
    """
    model = build_model(cfg)
    state = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    found = model.load_state_dict(state['state_dict'], strict=False)
    own = {name for name, _ in model.named_parameters()}
    wrong = [*own.intersection(found.missing_keys), *found.unexpected_keys]
    if wrong:
        raise UserError(f'{checkpoint} does not fit the model: {", ".join(wrong)}.')
    check_finite(model, str(checkpoint))
    return model.to(get_device()).eval()


def evaluate(cfg: Config, checkpoint: Path) -> dict[str, float]:
    """The test metrics of a config for the weights of a checkpoint.

    An entry ``coords_factor`` of the config multiplies all coordinates.
    """
    model = load_trained(cfg, checkpoint)
    if cfg.get('coords_factor'):
        rescale_coords(model, cfg.coords_factor)
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        with torch.no_grad():
            evaluator.process(model.test_step(batch), batch)
    metrics = evaluator.evaluate(len(loader.dataset))
    return {name: float(value) for name, value in metrics.items()}


def run_tests(folder: Path) -> None:
    """Do the tests of a trained run that it has not had."""
    cfg = load_config(str(folder / 'config.py'))
    result = read_result(folder)
    for test in cfg.tests:
        key = digest(test.options)
        if key not in result['tests']:
            metrics = evaluate(changed(cfg, test.options), last_checkpoint(folder))
            result['tests'][key] = {'name': test.name, **metrics}
            write_result(folder, result)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog='experiments.py', description=run_tests.__doc__)
    parser.add_argument('folder', type=Path, help='of the run')
    run_tests(parser.parse_args(argv).folder)


if __name__ == '__main__':
    run_cli(main, 'experiments.py')
