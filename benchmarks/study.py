"""Run one of the paper's comparisons: settings x seeds, and a table with intervals.

    python benchmarks/study.py --list
    python benchmarks/study.py relative --seeds 5 --jobs 2
    python benchmarks/study.py relative --config my_config.py --epochs 20
    python benchmarks/study.py relative --settings sp-sa psa

Every run is a training of its own through ``tools/train.py``. A finished run is not
repeated, not even for another study that has the same setting, and a killed one goes on
from its last checkpoint: the same command resumes a study. The studies are in
``benchmarks/studies.yml``.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, MODELS

from spvit_mm.apis import ArgumentParser, load_config, run_cli
from spvit_mm.models import SPViT
from spvit_mm.utils import UserError, new_figure

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / 'benchmarks' / 'studies.yml'
CONFIG = ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'
METRIC = 'accuracy/top1'


class Run(NamedTuple):
    """One training.

    Attributes:
        setting (str): Name of the setting.
        seed (int): Random seed.
        folder (Path): Its work dir.
        config (str): Its config, written out.
    """

    setting: str
    seed: int
    folder: Path
    config: str


class Place(NamedTuple):
    """Where the priors of the config under study are.

    Attributes:
        depth (int): All layers.
        num_spsa_layers (int): The first ones, which have priors.
        cls_token_layer (int): The class token joins before it; None without one.
    """

    depth: int
    num_spsa_layers: int
    cls_token_layer: int | None


def load_study(name: str, path: Path = STUDIES) -> dict:
    """Read a study; an unknown name is a UserError that lists the names."""
    studies = load(str(path))
    if name not in studies:
        raise UserError(f'No study {name!r}. There are: {", ".join(studies)}.')
    return studies[name]


def place_of(cfg: Config) -> Place:
    """Where a config's priors are; anything but an SP-ViT is a UserError."""
    backbone = build_backbone(cfg)
    if not isinstance(backbone, SPViT):
        raise UserError(
            f'{cfg.filename}: the studies change the priors of an SPViT, and '
            f'`model.backbone` is a {type(backbone).__name__}.'
        )
    return Place(
        backbone.num_layers, backbone.num_spsa_layers, backbone.cls_token_layer
    )


def expand(overrides: dict, cfg: Config, place: Place, epochs: int | None) -> dict:
    """Config overrides of a setting, its shorthands written out."""
    out = {} if epochs is None else {'train_cfg.max_epochs': epochs}
    for key, value in overrides.items():
        if key == 'spsa_share':
            count = round(value * place.depth)
            if count != place.num_spsa_layers:
                out['model.backbone.num_spsa_layers'] = count
                out['model.backbone.cls_token_layer'] = place.cls_token_layer
        elif key == 'times_epochs':
            out['train_cfg.max_epochs'] = (epochs or cfg.train_cfg.max_epochs) * value
        elif key == 'augment':
            *pipeline, pack = cfg.train_dataloader.dataset.pipeline
            out['train_dataloader.dataset.pipeline'] = [*pipeline, *value, pack]
        elif key == 'data_fraction':
            # As many batches an epoch as with all data. Evenly spaced samples, since a
            # folder dataset lists one class after another.
            data = cfg.train_dataloader.dataset.to_dict()
            total = len(build_dataset(data))
            chosen = data.get('indices', range(total))
            chosen = range(chosen) if isinstance(chosen, int) else chosen
            count = max(1, round(total * value))
            data['indices'] = [chosen[i * total // count] for i in range(count)]
            out['train_dataloader.dataset'] = dict(
                _delete_=True,
                type='RepeatDataset',
                times=max(1, round(1 / value)),
                dataset=data,
            )
        elif key.startswith(('backbone.', 'head.')):
            out[f'model.{key}'] = value
        else:
            out[key] = value
    return out


def build_backbone(cfg: Config):
    """The backbone of a config."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg.model.backbone)


def build_dataset(data: dict):
    """The dataset of a config, without its pipeline."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        try:
            return DATASETS.build({**data, 'pipeline': []})
        except (OSError, ValueError) as error:
            raise UserError(f'`train_dataloader.dataset`: {error}') from error


def plan(study: dict, cfg: Config, args, runs_dir: Path) -> list[Run]:
    """All runs of a study, seeds outermost so that partial results compare.

    A run's folder is named after its config, so that studies share it.
    """
    runs = []
    place = place_of(cfg)
    for seed in range(args.seeds):
        for setting, overrides in study['settings'].items():
            overrides = expand(overrides, cfg, place, args.epochs)
            overrides['randomness.seed'] = seed
            interval = args.val_interval or study.get('val_interval', 5)
            overrides['train_cfg.val_interval'] = interval
            text = config_text(overrides, cfg)
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            runs.append(Run(setting, seed, runs_dir / digest, text))
    return runs


def config_text(overrides: dict, cfg: Config) -> str:
    """The config of one run, written out."""
    own = Config(cfg.to_dict(), filename=cfg.filename)
    for key, value in overrides.items():
        if isinstance(value, dict) and value.get('_delete_'):
            value = {k: v for k, v in value.items() if k != '_delete_'}
            parent = own
            *path, last = key.split('.')
            for part in path:
                parent = parent[part]
            parent[last] = value
        else:
            own.merge_from_dict({key: value})
    return own.pretty_text


def check_backbones(runs: list[Run]) -> None:
    """Build the backbone of every setting; one that cannot be built is a UserError."""
    for run in runs:
        if run.seed == 0:
            try:
                build_backbone(Config.fromstring(run.config, '.py'))
            except (TypeError, ValueError, KeyError) as error:
                raise UserError(
                    f'Setting {run.setting!r} does not fit the config: {error} '
                    'Leave it out with --settings, or take another config.'
                ) from error


def check_settings(option: str, names: list[str], study: dict) -> None:
    """A name that is no setting of the study is a UserError that lists them."""
    unknown = [name for name in names if name not in study['settings']]
    if unknown:
        raise UserError(
            f'{option}: no setting {", ".join(unknown)}. '
            f'There are: {", ".join(study["settings"])}.'
        )


def choose(study: dict, settings: list[str]) -> dict:
    """Only these settings of a study, and what they are compared with."""
    check_settings('--settings', settings, study)
    wanted, left = set(), list(settings)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left.append(baseline_of(name, study))
    kept = {k: v for k, v in study['settings'].items() if k in wanted}
    return {**study, 'settings': kept}


def write_config(run: Run) -> Path:
    """Write a run's config; a folder of something else is refused.

    Raises:
        UserError: If the folder holds something else.
    """
    stamp = run.folder / 'study.json'
    digest = hashlib.sha256(run.config.encode()).hexdigest()
    if stamp.exists():
        if json.loads(stamp.read_text()).get('config') != digest:
            raise UserError(
                f'{run.folder} holds a run of other settings. Give another '
                '--work-dir, or remove that folder to run it anew.'
            )
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise UserError(
            f'{run.folder} is not empty and no run of a study. Give another --work-dir.'
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / 'config.py'
    path.write_text(run.config)
    stamp.write_text(json.dumps(dict(config=digest, setting=run.setting)))
    return path


def curve_of(folder: Path) -> dict[int, float]:
    """Accuracy by epoch of a run, over the logs of all its resumptions."""
    curve = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if METRIC in entry:
                curve[entry['step']] = entry[METRIC]
    return curve


def run_all(runs: list[Run], configs: dict, jobs: int) -> None:
    """Train what is not finished, ``jobs`` at a time."""
    todo = [run for run in runs if not (run.folder / 'result.json').exists()]
    print(f'{len(runs)} runs, {len(runs) - len(todo)} of them finished before.')
    start, done, active = time.time(), 0, {}
    queue = list(todo)
    # Terminated, it takes its runs with it, or the next start would train them twice.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while queue or active:
            while queue and len(active) < jobs:
                run = queue.pop(0)
                if (run.folder / 'result.json').exists():
                    done += 1
                    continue
                log = open(run.folder / 'output.log', 'a')  # noqa: SIM115
                try:
                    # The training inherits it, and keeps it should this process die.
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    # Another study trains it just now, so look again later.
                    log.close()
                    queue.append(run)
                    break
                command = [sys.executable, str(ROOT / 'tools/train.py')]
                command += [str(configs[run.folder]), '--work-dir', str(run.folder)]
                if (run.folder / 'last_checkpoint').exists():
                    command.append('--resume')
                env = {**os.environ, 'OMP_NUM_THREADS': '1'}
                process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
                active[process] = (run, log)
            time.sleep(0.5)
            for process in [p for p in active if p.poll() is not None]:
                run, log = active.pop(process)
                log.close()
                if process.returncode:
                    output = run.folder / 'output.log'
                    raise UserError(
                        f'The run {run.folder} ended with code {process.returncode}, '
                        f'{output} with: {output.read_text().strip().splitlines()[-1]}'
                    )
                curve = curve_of(run.folder)
                (run.folder / 'result.json').write_text(json.dumps(curve))
                done += 1
                left = (time.time() - start) / done * (len(todo) - done)
                print(
                    f'[{done}/{len(todo)}] {run.setting} seed {run.seed}: '
                    f'{curve[max(curve)]:.2f} %, about {left / 60:.0f} min left',
                    flush=True,
                )
    finally:
        for process, (_, log) in active.items():
            process.terminate()
            process.wait()
            log.close()


def summarize(study: dict, runs: list[Run]) -> list[dict]:
    """Mean and deviation of each setting, and its difference to its baseline.

    The baseline of a setting is the one that `against` of the study names, else the
    study's. The interval is that of a paired t-test over the seeds, 95 %.
    """
    from scipy import stats

    final, reached = {}, {}
    for run in runs:
        curve = json.loads((run.folder / 'result.json').read_text())
        curve = {int(epoch): value for epoch, value in curve.items()}
        final.setdefault(run.setting, []).append(curve[max(curve)])
        epochs = [e for e, value in curve.items() if value >= study.get('reach', 0)]
        reached.setdefault(run.setting, []).append(min(epochs, default=np.nan))
    rows = []
    for setting, values in final.items():
        values = np.array(values)
        n = len(values)
        row = dict(setting=setting, seeds=n, mean=values.mean())
        row['std'] = values.std(ddof=1) if n > 1 else float('nan')
        row['against'] = baseline_of(setting, study)
        diff = values - np.array(final[row['against']])
        row['difference'] = diff.mean()
        spread = diff.std(ddof=1) / n**0.5 if n > 1 else float('nan')
        row['interval'] = spread * stats.t.ppf(0.975, n - 1) if n > 1 else spread
        if 'reach' in study:
            # nan where a seed never does
            row['epochs'] = np.mean(reached[setting])
        rows.append(row)
    return rows


def baseline_of(setting: str, study: dict) -> str:
    """What a setting is compared with."""
    return study.get('against', {}).get(setting, study['baseline'])


def table(rows: list[dict]) -> str:
    """The summary in Markdown."""
    lines = [
        '| setting | top-1 (%) | std | difference | to | 95 % interval |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        low, high = (row['difference'] + s * row['interval'] for s in (-1, 1))
        compared = (
            '| | | |'
            if row['setting'] == row['against']
            else f'| {row["difference"]:+.2f} | {row["against"]} '
            f'| {low:+.2f} .. {high:+.2f} |'
        )
        lines.append(
            f'| {row["setting"]} | {row["mean"]:.2f} | {row["std"]:.2f} {compared}'
        )
    if 'epochs' in rows[0]:
        lines[0] += ' epochs to get there |'
        lines[1] += ' --- |'
        for i, row in enumerate(rows, 2):
            reached = not np.isnan(row['epochs'])
            lines[i] += f' {row["epochs"]:.1f} |' if reached else ' not in every seed |'
    return '\n'.join(lines)


def draw(name: str, study: dict, rows: list[dict], runs: list[Run], path: Path) -> None:
    """Bars with the standard deviation, and the learning curves."""
    figure = new_figure(10, 4)
    bars, curves = figure.subplots(1, 2)
    names = [row['setting'] for row in rows]
    bars.bar(names, [r['mean'] for r in rows], yerr=[r['std'] for r in rows], capsize=3)
    low = min(r['mean'] - 2 * np.nan_to_num(r['std']) for r in rows)
    bars.set_ylim(max(0, low - 1), min(bars.get_ylim()[1], 101))
    bars.set_ylabel('top-1 (%), mean and deviation over seeds')
    bars.tick_params(axis='x', rotation=30)
    for setting in names:
        own = [
            json.loads((run.folder / 'result.json').read_text())
            for run in runs
            if run.setting == setting
        ]
        epochs = sorted({int(epoch) for curve in own for epoch in curve})
        mean = [np.mean([curve[str(e)] for curve in own]) for e in epochs]
        curves.plot(epochs, mean, label=setting)
    curves.set_xlabel('epoch')
    curves.set_ylabel('top-1 (%), mean over seeds')
    curves.legend(fontsize='small')
    figure.suptitle(f'{name}: {study["claim"]}')
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog='study.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('study', nargs='?', help='name of the study')
    parser.add_argument('--list', action='store_true', help='list the studies')
    parser.add_argument(
        '--settings',
        nargs='+',
        metavar='NAME',
        help='only these, and what they are compared with',
    )
    parser.add_argument(
        '--baseline', metavar='NAME', help="compare all with this one, not the study's"
    )
    parser.add_argument('--config', default=str(CONFIG), help='what is trained')
    parser.add_argument('--seeds', type=int, default=5, help='seeds 0, 1, ...')
    parser.add_argument('--epochs', type=int, help="instead of the config's")
    parser.add_argument(
        '--val-interval',
        type=int,
        metavar='EPOCHS',
        help="instead of the study's, or 5",
    )
    parser.add_argument(
        '--reach', type=float, metavar='PERCENT', help='accuracy to count the epochs to'
    )
    parser.add_argument('--jobs', type=int, default=2, help='runs side by side')
    parser.add_argument('--work-dir', default='work_dirs/studies')
    args = parser.parse_args(argv)
    if args.list:
        for name, study in load(str(STUDIES)).items():
            print(f'{name:12} {len(study["settings"])} settings: {study["claim"]}')
        return
    if args.study is None:
        raise UserError('Name a study, or --list them.')
    if args.seeds < 1 or args.jobs < 1:
        raise UserError(
            f'--seeds and --jobs must be at least 1, got {args.seeds} and {args.jobs}.'
        )
    study = load_study(args.study)
    if args.baseline:
        check_settings('--baseline', [args.baseline], study)
        study = {**study, 'baseline': args.baseline, 'against': {}}
    if args.settings:
        study = choose(study, args.settings)
    if args.reach is not None:
        study['reach'] = args.reach
    cfg = load_config(args.config)
    runs = plan(study, cfg, args, Path(args.work_dir) / 'runs')
    check_backbones(runs)
    run_all(runs, {run.folder: write_config(run) for run in runs}, args.jobs)

    rows = summarize(study, runs)
    print(f'\n{args.study}: {study["claim"]}')
    print(f'Accuracy to get to: {study["reach"]} %\n' if 'reach' in study else '')
    print(table(rows))
    name = f'{args.study}_{Path(args.config).stem}'
    if args.baseline:
        name += f'_to-{args.baseline.replace("/", "-")}'
    work_dir = Path(args.work_dir) / name
    work_dir.mkdir(exist_ok=True)
    with open(work_dir / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(args.study, study, rows, runs, work_dir / 'results.png')
    print(f'\nWritten: {work_dir}/results.csv, {work_dir}/results.png')


if __name__ == '__main__':
    run_cli(main, 'study.py')
