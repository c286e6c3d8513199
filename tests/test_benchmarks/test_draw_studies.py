import csv
import json
import re

import draw_studies
import pytest
from comparison import seed_deviation
from scipy import stats
from study import ACCURACY


def line(setting, seed, top1, tests):
    tests = {k: {'name': k, ACCURACY: v} for k, v in tests.items()}
    curve = {'4': top1 - 5, '8': top1}
    key = f'{setting} {seed}'
    return json.dumps(
        dict(setting=setting, seed=seed, key=key, curve=curve, tests=tests)
    )


def test_a_record_with_missing_seeds_is_drawn(tmp_path, capsys):
    sizes = {'64x64': 60.0, '96x96': 50.0}
    tuned = {'held out, 96x96, 0': 1.0, 'held out, 96x96, 1': 2.0, '96x96, 1': 55.0}
    lines = ['{"protocol": {}}']
    for seed, (low, high) in enumerate([(50.0, 70.0), (51.0, 72.0), (49.0, 70.0)]):
        lines.append(line('none', seed, low, sizes))
        lines.append(line('product, cone', seed, high, {**sizes, **tuned}))
    # The order is the study's; a seed that is there without the one before is left out.
    lines += [line('sum, cone', seed, 73.0, sizes) for seed in (0, 1)]
    lines += [line('rotary mixed', seed, 99.0, sizes) for seed in (1, 2)]
    lines += [line('sum, flat', seed, 60.0 + seed, sizes) for seed in (0, 2, 3)]
    path = tmp_path / 'positions_x.jsonl'
    path.write_text('\n'.join(lines))
    draw_studies.draw_records([path], tmp_path)
    with (tmp_path / 'positions_x.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [(row['setting'], row['against'], row['seeds']) for row in rows] == [
        ('product, cone', 'none', '3'),
        ('sum, cone', 'none', '2'),
        ('sum, flat', 'none', '1'),
        ('none', 'product, cone', '3'),
        ('sum, cone', 'product, cone', '2'),
        ('sum, flat', 'product, cone', '1'),
    ]
    assert float(rows[4]['difference']) == pytest.approx(2.0)
    out = capsys.readouterr().out
    assert '| product, cone | 60.0 ± 0.0 | 55.0 ± 0.0 |' in out
    assert (tmp_path / 'positions_x.png').stat().st_size > 10_000


def test_records_of_one_data_share_the_deviation_of_a_seed(tmp_path):
    lines = [line('none', seed, 60.0 + seed, {}) for seed in (0, 1)]
    lines += [line('absolute', seed, x, {}) for seed, x in enumerate((65.0, 67.0))]
    # The same runs as the first record's 'absolute', and one more.
    more = [
        text.replace('"setting": "absolute"', '"setting": "none"') for text in lines
    ]
    more = [*more[2:], line('sum, cone', 0, 70.0, {})]
    paths = []
    for name, own in (('one', lines), ('two', more)):
        paths.append(tmp_path / f'positions_{name}.jsonl')
        paths[-1].write_text('\n'.join(['{"protocol": {}}', *own]))
    draw_studies.draw_records(paths, tmp_path)
    with (tmp_path / 'positions_two.csv').open() as file:
        (row,) = csv.DictReader(file)
    # Two methods and two seeds leave one degree of freedom, which the second record has not.
    deviation, freedom = seed_deviation({'none': [60, 61], 'absolute': [65, 67]})
    assert freedom == 1
    wide = stats.t.ppf(0.975, 1) * deviation * 2**0.5
    assert float(row['interval']) == pytest.approx(wide)


def test_figures_are_drawn_from_the_csvs(tmp_path, capsys):
    draw_studies.main(['--out-dir', str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob('*.png')}
    assert {'prior.png', 'training.png', 'start_search.png'} <= drawn
    kept = {path.name for path in draw_studies.STUDIES.glob('*.png')}
    assert drawn <= kept
    text = (draw_studies.STUDIES.parent / 'studies.md').read_text()
    assert drawn <= set(re.findall(r'\(studies/(\w+\.png)\)', text))


def test_every_result_is_linked_and_there():
    docs = draw_studies.STUDIES.parent
    links = set()
    for page in ('studies.md', 'resolution.md'):
        links |= set(re.findall(r'\(studies/([\w.-]+)\)', (docs / page).read_text()))
    there = {path.name for path in draw_studies.STUDIES.iterdir()}
    of_sizes = {name for name in there if re.fullmatch(r'resolution_\w+\.csv', name)}
    assert links == there - of_sizes
