"""Run one of the paper's comparisons: settings x seeds, and a table with intervals.

    python benchmarks/study.py --list
    python benchmarks/study.py relative --seeds 5 --jobs 2
    python benchmarks/study.py relative --config my_config.py --epochs 20
    python benchmarks/study.py relative --settings sp-sa psa
    python benchmarks/study.py relative --cfg-options optim_wrapper.optimizer.lr=0.0005

Every run is a training of its own through ``tools/train.py``. A finished run is not
repeated, not even for another study that has the same setting, and a killed one goes on
from its last checkpoint: the same command resumes a study. With ``--record FILE`` the
results are kept in a file to commit, and what it holds is not run again anywhere. The
studies are in ``benchmarks/studies.yml``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import experiments
import numpy as np
from comparison import (
    compare,
    comparison_table,
    draw_curves,
    draw_differences,
    draw_values,
    values_table,
)
from experiments import ACCURACY, Run
from measuring import write_csv
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, MODELS

from spvit_mm.apis import add_cfg_options, building, scope_of
from spvit_mm.models import SPViT
from spvit_mm.utils import UserError, new_figure, save_figure

STUDIES = experiments.ROOT / 'benchmarks' / 'studies.yml'
CONFIG = experiments.ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'


# Entries of a config under study.
NEEDED = (
    *('model', 'train_dataloader', 'val_dataloader', 'val_evaluator'),
    *('train_cfg', 'optim_wrapper'),
)

# Factors to try at another size: of (area of training / area) ** (power / 2). 0 leaves the
# coordinates in patches, 1 keeps the border of an image where it was.
POWERS = (-0.5, 0, 0.5, 1)


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


def load_study(name: str) -> dict:
    """Read a study; an unknown name is a UserError that lists the names."""
    studies = load(str(STUDIES))
    if name not in studies:
        raise UserError(f'No study {name!r}. There are: {", ".join(studies)}.')
    return studies[name]


def place_of(cfg: Config) -> Place:
    """Where a config's priors are; anything but an SP-ViT is a UserError."""
    with building(f'The backbone of {cfg.filename}'):
        backbone = build_backbone(cfg)
    if not isinstance(backbone, SPViT):
        raise UserError(
            f'{cfg.filename}: the studies change the priors of an SPViT, and '
            f'`model.backbone` is a {type(backbone).__name__}.'
        )
    return Place(
        backbone.num_layers, backbone.num_spsa_layers, backbone.cls_token_layer
    )


def expand(overrides: dict, cfg: Config, place: Place) -> dict:
    """Config overrides of a setting, its shorthands written out."""
    out = {}
    for key, value in overrides.items():
        if key == 'spsa_share':
            count = round(value * place.depth)
            if count != place.num_spsa_layers:
                out['model.backbone.num_spsa_layers'] = count
                out['model.backbone.cls_token_layer'] = place.cls_token_layer
        elif key == 'times_epochs':
            out['train_cfg.max_epochs'] = cfg.train_cfg.max_epochs * value
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


def build_dataset(data: dict, name: str = 'train_dataloader'):
    """The dataset of a config, without its pipeline."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        try:
            return DATASETS.build({**data, 'pipeline': []})
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f'`{name}.dataset`: {error}. docs/studies.md says where the images of '
                'the studies come from.'
            ) from error


def check_images(cfg: Config) -> None:
    """Images that are missing are a UserError, which says what is expected.

    The ``indices`` of a dataset say how many there must be.
    """

    def look(name: str, data: dict) -> None:
        for i, part in enumerate(data.get('datasets', [])):
            look(f'{name}.datasets[{i}]', part)
        if 'datasets' in data or 'data_prefix' not in data:
            return
        where = f'{data.get("data_root", "")}/{data["data_prefix"]}'.replace('//', '/')
        indices = data.get('indices')
        indices = range(indices) if isinstance(indices, int) else indices
        found = len(build_dataset({**data, 'indices': None}, name))
        if indices and max(indices) >= found:
            raise UserError(
                f'`{name}.dataset`: {where} must have at least {max(indices) + 1:,} images, '
                f'in one folder per class, but has {found:,}. docs/studies.md says where '
                'they come from.'
            )

    for name in ('train_dataloader', 'val_dataloader'):
        look(name, cfg[name].dataset.to_dict())


def config_under_study(study: dict, cfg: Config, args) -> Config:
    """The config with what all settings have in common.

    One that lacks an entry, or is of no classifier, is a UserError.
    """
    experiments.check_entries(cfg, NEEDED)
    if scope_of(cfg) == 'mmseg':
        raise UserError(
            f'{cfg.filename} is a config of mmseg; the studies compare accuracies of '
            'image classifiers.'
        )
    interval = args.val_interval or study.get('val_interval', 5)
    options = {'train_cfg.val_interval': interval}
    if args.epochs is not None:
        options['train_cfg.max_epochs'] = args.epochs
    return experiments.changed(cfg, options)


def plan(study: dict, cfg: Config, seeds: int) -> list[Run]:
    """All runs of a study, seeds outermost so that partial results compare."""
    place = place_of(cfg)
    plain, tuned = tests_at_sizes(study, cfg)
    return [
        experiments.make_run(
            setting,
            seed,
            cfg,
            expand(overrides, cfg, place),
            plain if overrides.get('spsa_share') == 0 else {**plain, **tuned},
        )
        for seed in range(seeds)
        for setting, overrides in study['settings'].items()
    ]


def tests_at_sizes(study: dict, cfg: Config) -> tuple[dict, dict]:
    """The tests at each size of the study, and those that tune a factor for it.

    The factor multiplies the coordinates of the patches. It is tuned where the config
    has ``held_out``: what of ``test_dataloader.dataset`` leads to images to tune with.
    """
    plain, tuned = {}, {}
    trained = cfg.model.backbone.get('img_size', 224)
    area = np.prod(trained) if isinstance(trained, (list, tuple)) else trained**2
    for h, w in study.get('sizes', []):
        at = experiments.resized(cfg, (h, w))
        plain[f'{h}x{w}'] = at
        if 'held_out' not in cfg or h * w == area:
            continue
        held_out = {f'test_dataloader.dataset.{k}': v for k, v in cfg.held_out.items()}
        for power in POWERS:
            factor = {'coords_factor': round((area / h / w) ** (power / 2), 3)}
            factor = factor if power else {}
            tuned[f'held out, {h}x{w}, {power}'] = {**at, **held_out, **factor}
            if power:
                tuned[f'{h}x{w}, {power}'] = {**at, **factor}
    return plain, tuned


def plain_metrics(metrics: dict[str, dict]) -> dict[str, float]:
    """The accuracy at each size, the coordinates as they are."""
    return {size: x[ACCURACY] for size, x in metrics.items() if ',' not in size}


def tuned_metrics(metrics: dict[str, dict]) -> dict[str, float]:
    """The accuracy at each size with the factor that is best on held-out images.

    Args:
        metrics (dict): Of a run's tests, by their names in :func:`tests_at_sizes`.
    """
    found = {}
    for size in metrics:
        if ',' in size:
            continue
        names = {f'held out, {size}, {power}': power for power in POWERS}
        tried = {names[x]: metrics[x][ACCURACY] for x in names if x in metrics}
        # Of equals the one nearest to the coordinates as they are.
        best = max(tried, key=lambda x: (tried[x], -abs(x)), default=0)
        found[size] = metrics[f'{size}, {best}' if best else size][ACCURACY]
    return found


def check_backbones(runs: list[Run]) -> None:
    """Build the backbone of every setting; one that cannot be built is a UserError."""
    for run in runs:
        if run.seed == 0:
            try:
                build_backbone(run.config)
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


def baseline_of(setting: str, study: dict) -> str:
    """What a setting is compared with."""
    return study.get('against', {}).get(setting, study['baseline'])


def by_setting(runs: list[Run], values: list) -> dict[str, list]:
    """A value of each run, the seeds of a setting together."""
    found = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(run.setting, []).append(value)
    return found


def summarize(study: dict, runs: list[Run], results: list[dict]) -> list[dict]:
    """The comparison of the settings where training ended.

    With ``reach``, each row has the mean epoch at which that accuracy was reached, nan
    where a seed never gets there.
    """
    finals = by_setting(runs, [experiments.final(result) for result in results])
    against = {name: baseline_of(name, study) for name in finals}
    rows = compare(finals, against, pooled=study.get('pooled', False))
    if 'reach' in study:
        curves = by_setting(runs, [result['curve'] for result in results])
        for row in rows:
            row['epochs'] = np.mean(
                [
                    min(
                        (int(k) for k, v in curve.items() if v >= study['reach']),
                        default=np.nan,
                    )
                    for curve in curves[row['setting']]
                ]
            )
    return rows


def table(rows: list[dict]) -> str:
    """The summary in Markdown."""
    lines = comparison_table(rows).split('\n')
    if 'epochs' in rows[0]:
        lines[0] += ' epochs to get there |'
        lines[1] += ' --- |'
        for i, row in enumerate(rows, 2):
            reached = not np.isnan(row['epochs'])
            lines[i] += f' {row["epochs"]:.1f} |' if reached else ' not in every seed |'
    return '\n'.join(lines)


def compare_tests(
    runs: list[Run], accuracies: list[dict], against: dict, pooled: bool = False
) -> tuple[list, dict]:
    """The comparison at each size of image.

    Args:
        runs (list[Run]): The runs.
        accuracies (list[dict]): Of each run, by the name of a test.
        against (dict): The baseline of each setting.
        pooled (bool): As of :func:`comparison.compare`. Defaults to False.

    Returns:
        tuple[list, dict]: All rows, and by setting the values at each size.
    """
    rows, values = [], {setting: [] for setting in against}
    for test in accuracies[0]:
        found = by_setting(runs, [own[test] for own in accuracies])
        rows += [{'test': test, **row} for row in compare(found, against, pooled)]
        for setting, own in found.items():
            values[setting].append(own)
    return rows, values


def accuracies_at_sizes(runs: list[Run], results: list[dict]) -> dict[str, list[dict]]:
    """Each run's accuracy by size, of what was trained and with a tuned factor.

    Returns:
        dict[str, list[dict]]: 'tests', and 'tuned' where something was tuned.
    """
    metrics = [experiments.tested(x, run) for x, run in zip(results, runs, strict=True)]
    tables = {'tests': [plain_metrics(own) for own in metrics]}
    if any(',' in name for own in metrics for name in own):
        tables['tuned'] = [tuned_metrics(own) for own in metrics]
    return tables


def draw_sizes(
    axis, name: str, runs: list[Run], accuracies: list, against: dict, pooled=False
) -> list[dict]:
    """Print and draw the accuracies by size; the rows of their comparison.

    ``name`` is that of the table in :func:`accuracies_at_sizes`, the others are as of
    :func:`compare_tests`.
    """
    rows, values = compare_tests(runs, accuracies, against, pooled)
    sizes = list(accuracies[0])
    factor = ', factor of the coordinates tuned' if name == 'tuned' else ''
    print(f'\n{values_table(sizes, values, f"setting, tested at{factor}")}')
    draw_values(axis, sizes, values)
    axis.set(xlabel=f'image at test{factor}', ylabel='top-1 (%), mean over seeds')
    return rows


def report(title: str, study: dict, runs: list[Run], results: list, out: Path) -> None:
    """Print the tables; write them as CSV, and one picture."""
    rows = summarize(study, runs, results)
    print(f'\n{title}')
    print(f'Accuracy to get to: {study["reach"]} %\n' if 'reach' in study else '')
    print(table(rows))
    write_csv(out / 'results.csv', rows)
    tables = accuracies_at_sizes(runs, results) if runs[0].tests else {}
    figure = new_figure(10 + 5 * len(tables), 1.5 + 0.4 * max(6, len(rows)))
    axes = figure.subplots(1, 2 + len(tables))
    draw_differences(axes[0], rows)
    draw_curves(axes[1], by_setting(runs, [result['curve'] for result in results]))
    against = {row['setting']: row['against'] for row in rows}
    for axis, (name, found) in zip(axes[2:], tables.items(), strict=True):
        compared = draw_sizes(
            axis, name, runs, found, against, study.get('pooled', False)
        )
        write_csv(out / f'{name}.csv', compared)
    figure.suptitle(title)
    save_figure(figure, str(out / 'results.png'), dpi=120)
    print(f'\nWritten: {out}/results.csv, {out}/results.png')


def main(argv: list[str]) -> None:
    parser = experiments.ArgumentParser(
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
        help='only these, and what they are compared with (default: all)',
    )
    parser.add_argument(
        '--baseline',
        metavar='NAME',
        help="compare all with this one (default: the study's)",
    )
    parser.add_argument(
        '--config', default=str(CONFIG), help='what is trained (default: %(default)s)'
    )
    parser.add_argument(
        '--epochs',
        type=experiments.number(1),
        help="length of a training (default: the config's)",
    )
    parser.add_argument(
        '--val-interval',
        type=experiments.number(1),
        metavar='EPOCHS',
        help="from one evaluation to the next (default: the study's, else 5)",
    )
    parser.add_argument(
        '--reach',
        type=experiments.number(0, 100, float),
        metavar='PERCENT',
        help="accuracy to count the epochs to (default: the study's, if it has one)",
    )
    add_cfg_options(parser)
    experiments.add_run_options(parser, work_dir='work_dirs/studies', seeds=5)
    args = parser.parse_args(argv)
    if args.list:
        for name, study in load(str(STUDIES)).items():
            print(f'{name:12} {len(study["settings"])} settings: {study["claim"]}')
        return
    if args.study is None:
        raise UserError('Name a study, or --list them.')
    experiments.check_run_options(args)
    study = load_study(args.study)
    if args.baseline:
        check_settings('--baseline', [args.baseline], study)
        study = {**study, 'baseline': args.baseline, 'against': {}}
    if args.settings:
        study = choose(study, args.settings)
    if args.reach is not None:
        study['reach'] = args.reach
    cfg = experiments.load_config(args.config, args.cfg_options)
    cfg = config_under_study(study, cfg, args)
    record = experiments.open_record(args, cfg, metric=ACCURACY)
    runs = plan(study, cfg, args.seeds)
    check_backbones(runs)
    if not experiments.all_recorded(runs, record):
        check_images(cfg)
    results = experiments.run_all(runs, args.work_dir, args.jobs, record)

    name = f'{args.study}_{Path(args.config).stem}'
    if args.baseline:
        name += f'_to-{args.baseline.replace("/", "-")}'
    if args.cfg_options:
        name += f'_{experiments.digest(args.cfg_options)}'
    title = f'{args.study}: {study["claim"]}'
    report(title, study, runs, results, args.work_dir / name)


if __name__ == '__main__':
    experiments.run_cli(main, 'study.py')
