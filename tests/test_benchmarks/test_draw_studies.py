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
    lines = []
    for seed, (low, high) in enumerate([(50.0, 70.0), (51.0, 72.0), (49.0, 70.0)]):
        lines.append(line('none', seed, low, sizes))
        lines.append(line('product, cone', seed, high, {**sizes, **tuned}))
    # The order is the study's; a seed that is there without the one before is left out.
    lines += [line('sum, cone', seed, 73.0, sizes) for seed in (0, 1)]
    lines += [line('rotary mixed', seed, 99.0, sizes) for seed in (1, 2)]
    lines += [line('sum, flat', seed, 60.0 + seed, sizes) for seed in (0, 2, 3)]
    path = write_record(tmp_path / 'positions_x.jsonl', *lines)
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
        ('none', 'sum, cone', '3'),
        ('product, cone', 'sum, cone', '3'),
        ('sum, flat', 'sum, cone', '1'),
    ]
    assert float(rows[4]['difference']) == pytest.approx(2.0)
    out = capsys.readouterr().out
    assert '| product, cone | 60.0 ± 0.0 | 55.0 ± 0.0 |' in out
    assert (tmp_path / 'positions_x.png').stat().st_size > 10_000


def write_record(path, *lines):
    path.write_text('\n'.join(['{"protocol": {}}', *lines]))
    return path


def test_records_of_one_data_share_the_deviation_of_a_seed(tmp_path):
    lines = [line('none', seed, 60.0 + seed, {}) for seed in (0, 1, 2)]
    same = [line('absolute', seed, x, {}) for seed, x in enumerate((65.0, 67.0, 66.5))]
    # Another record has two of these runs under another name, and one more.
    others = [
        text.replace('"setting": "absolute"', '"setting": "none"') for text in same
    ]
    one = write_record(tmp_path / 'positions_one.jsonl', *lines, *same)
    two = write_record(
        tmp_path / 'positions_two.jsonl', *others[:2], line('sum, cone', 0, 70.0, {})
    )
    deviation, freedom = seed_deviation(
        {'none': [60.0, 61.0, 62.0], 'absolute': [65.0, 67.0, 66.5]}
    )
    assert freedom == 2
    for paths in ([one, two], [two, one]):
        assert draw_studies.draw_records(paths, tmp_path) == [p.stem for p in paths]
        with (tmp_path / 'positions_two.csv').open() as file:
            row, *_ = csv.DictReader(file)
        assert (row['setting'], row['against']) == ('sum, cone', 'none')
        wide = stats.t.ppf(0.975, 2) * deviation * 2**0.5
        assert float(row['interval']) == pytest.approx(wide)


@pytest.mark.parametrize('settings', [['none'], ['alibi', 'rotary mixed']])
def test_a_record_without_a_comparison_is_left_out(settings, tmp_path, capsys):
    lines = [line(setting, 0, 60.0, {}) for setting in settings]
    path = write_record(tmp_path / 'positions_x.jsonl', *lines)
    assert draw_studies.draw_records([path], tmp_path) == []
    assert 'positions_x has nothing to compare yet' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


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
