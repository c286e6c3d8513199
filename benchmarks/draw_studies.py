"""Draw the figures of docs/studies.md from the CSVs in docs/studies.

    python benchmarks/draw_studies.py

A study's CSVs are those that study.py writes, named STUDY_DATA.csv; its figure has one
panel for each. Not drawn are studies of sizes and of epochs to an accuracy, which have
figures of their own, by resolution.py and study.py.
"""

import argparse
import csv
from pathlib import Path

from comparison import draw_differences
from measuring import check_folder

from spvit_mm.utils import new_figure, save_figure

STUDIES = Path(__file__).resolve().parents[1] / 'docs' / 'studies'
DATA = {'digits': 'digits', 'cifar': 'CIFAR-10, 5,000 images'}
NAMES = ('setting', 'against')


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
    draw_search(STUDIES / 'start_search.csv', args.out_dir / 'start_search.png')
    print(f'Drawn into {args.out_dir}: {", ".join(studies)}, start_search')


if __name__ == '__main__':
    main()
