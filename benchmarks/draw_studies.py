"""Draw the figures of docs/studies.md from what docs/studies holds.

    python benchmarks/draw_studies.py

A study's CSVs are those that study.py writes, named STUDY_DATA.csv; its figure has one
panel for each. Not drawn are studies of sizes and of epochs to an accuracy, which have
figures of their own, by resolution.py and study.py. The position study has records, from
which its tables are printed and written as CSV, too; seeds may be missing there.
"""

import argparse
import csv
import json
from itertools import count, takewhile
from pathlib import Path

from comparison import compare, comparison_table, draw_curves, draw_differences
from experiments import ACCURACY, Run, final
from measuring import check_folder, write_csv
from study import accuracies_at_sizes, draw_sizes, load_study

from spvit_mm.utils import new_figure, save_figure

STUDIES = Path(__file__).resolve().parents[1] / 'docs' / 'studies'
DATA = {'digits': 'digits', 'cifar': 'CIFAR-10, 5,000 images'}
NAMES = ('setting', 'against')
# The records of the position study, positions_NAME.jsonl, by data: those of one share
# the deviation of a seed.
RECORDS = (
    ('cifar10', 'cifar10_embed', 'cifar10_120e', 'cifar10_50k'),
    ('imagenette',),
)
# What its methods are compared with, where a record has it; in the figure, the last.
BASELINES = ('none', 'product, cone', 'sum, cone')


def read_rows(path: Path) -> list[dict]:
    """The rows of a comparison, as study.py wrote them."""
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in NAMES else float(v) for k, v in r.items()} for r in rows]


def draw(panels: dict[str, list[dict]], path: Path) -> None:
    """One picture, a panel for each data set."""
    most = max(len(rows) for rows in panels.values())
    figure = new_figure(6 * len(panels), 1.3 + 0.4 * most)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        draw_differences(axis, rows)
        axis.set_title(name)
    save_figure(figure, str(path), dpi=90)


def draw_search(path: Path, out: Path) -> None:
    """The search for a start: every seed's accuracy."""
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    kinds = list(dict.fromkeys(row['data'] for row in rows))
    figure = new_figure(6 * len(kinds), 4.5)
    axes = figure.subplots(1, len(kinds), sharey=True)
    names = list(dict.fromkeys(row['setting'] for row in rows))
    for axis, data in zip(axes, kinds, strict=True):
        own = [row for row in rows if row['data'] == data]
        places = [names.index(row['setting']) for row in own]
        axis.plot([float(row['top1']) for row in own], places, 'o')
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel('top-1 (%), one point per seed')
        axis.set_title(data)
        axis.grid(axis='y', linewidth=0.3)
    axes[0].invert_yaxis()
    save_figure(figure, str(out), dpi=90)


def read_record(path: Path) -> dict[str, list[dict]]:
    """By setting, in the study's order, the results of the seeds 0, 1, ... there are.

    A seed that is there without the one before it is left out: seeds are paired.
    """
    found = {setting: {} for setting in load_study('positions')['settings']}
    for line in map(json.loads, path.read_text().splitlines()):
        if 'setting' in line:
            seeds = found[line['setting']]
            seeds.setdefault(line['seed'], line)['tests'].update(line['tests'])
    whole = {
        setting: [seeds[i] for i in takewhile(seeds.__contains__, count())]
        for setting, seeds in found.items()
    }
    return {setting: results for setting, results in whole.items() if results}


def draw_records(paths: list[Path], out_dir: Path) -> list[str]:
    """Tables, CSVs and figures of records of the position study.

    The deviation of a seed is taken from all that are given. A method with an absolute
    embedding, or trained longer, counts as another one; a run that two records have counts
    once. A record in which nothing can be compared yet is left out.

    Returns:
        list[str]: The names of those that are drawn.
    """
    records = {path: read_record(path) for path in paths}
    ends, every = {}, {}
    for path, record in records.items():
        ends[path] = {setting: list(map(final, own)) for setting, own in record.items()}
        for setting, own in record.items():
            first = own[0]['key']
            every[first] = max(every.get(first, []), ends[path][setting], key=len)
    drawn = []
    for path, record in records.items():
        tables = {
            baseline: compare(ends[path], dict.fromkeys(record, baseline), pooled=every)
            for baseline in BASELINES
            if baseline in record
        }
        if tables and len(record) > 1:
            draw_record(path, record, tables, out_dir)
            drawn.append(path.stem)
        else:
            print(f'{path.stem} has nothing to compare yet.')
    return drawn


def draw_record(path: Path, record: dict, tables: dict, out_dir: Path) -> None:
    """The tables, by what is compared with, the CSV and the figure of one record."""
    print(path.stem)
    for rows in tables.values():
        print(f'\n{comparison_table(rows)}')
    rows = [x for own in tables.values() for x in own if x['setting'] != x['against']]
    write_csv(out_dir / f'{path.stem}.csv', rows)

    runs = [
        Run(
            setting,
            x['seed'],
            x['key'],
            None,
            {k: test['name'] for k, test in x['tests'].items()},
            ACCURACY,
        )
        for setting, own in record.items()
        for x in own
    ]
    results = [x for own in record.values() for x in own]
    sizes = accuracies_at_sizes(runs, results) if runs[0].tests else {}
    height = 2 if sizes else 1
    figure = new_figure(12, 5 * height)
    axes = figure.subplots(height, 2).flatten()
    baseline = list(tables)[-1]
    best_first = sorted(tables[baseline], key=lambda row: -row['mean'])
    draw_differences(axes[0], [row for row in best_first if row['setting'] != 'none'])
    axes[0].set_title(f'to {baseline!r}')
    names = [row['setting'] for row in best_first]
    draw_curves(axes[1], {name: [x['curve'] for x in record[name]] for name in names})
    against = dict.fromkeys(record, list(tables)[0])
    for axis, (name, found) in zip(axes[2:], sizes.items(), strict=False):
        draw_sizes(axis, name, runs, found, against)
    for axis in axes[2 + len(sizes) :]:
        axis.set_axis_off()
    save_figure(figure, str(out_dir / f'{path.stem}.png'), dpi=90)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out-dir', type=Path, default=STUDIES)
    args = parser.parse_args(argv)
    check_folder(parser, args.out_dir)
    studies = {}
    for data, title in DATA.items():
        for path in sorted(STUDIES.glob(f'*_{data}.csv')):
            study = path.stem.removesuffix(f'_{data}')
            if study not in ('resolution', 'convergence'):
                studies.setdefault(study, {})[title] = read_rows(path)
    for study, panels in studies.items():
        draw(panels, args.out_dir / f'{study}.png')
    for names in RECORDS:
        paths = [STUDIES / f'positions_{name}.jsonl' for name in names]
        paths = [path for path in paths if path.exists()]
        studies.update(dict.fromkeys(draw_records(paths, args.out_dir)))
    draw_search(STUDIES / 'start_search.csv', args.out_dir / 'start_search.png')
    print(f'Drawn into {args.out_dir}: {", ".join(studies)}, start_search')


if __name__ == '__main__':
    main()
