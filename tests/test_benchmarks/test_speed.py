import csv
import itertools
import sys
from pathlib import Path

import measuring
import pytest
import speed
import yaml
from torch.utils.benchmark import Timer


def test_contestants_take_turns():
    order = []
    timers = {
        name: Timer('order.append(name)', globals={'order': order, 'name': name})
        for name in 'ab'
    }
    times = measuring.time_in_turns(timers, rounds=3, least=0)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == list('ababab')
    assert [len(values) for values in times.values()] == [3, 3]
    assert all(value > 0 for values in times.values() for value in values)


def test_peak_counts_what_was_held(tmp_path):
    """In a process of its own: this one may hold free memory that serves the array."""
    script = tmp_path / 'script.py'
    script.write_text(
        f'import sys\nsys.path.insert(0, {str(Path(measuring.__file__).parent)!r})\n'
        'import measuring\n'
        'before = measuring.resident_peak(forget=True)\n'
        'held = bytearray(b"1") * 2**26\n'  # 64 MB
        'peak = measuring.resident_peak()\n'
        'del held\n'
        'print([before, peak, measuring.resident_peak()])\n'
    )
    before, peak, after = measuring.run_apart(str(script))
    assert 50 < peak - before < 100
    assert after == pytest.approx(peak, abs=1)


def test_failing_process_is_told(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys\nprint("[1, 2]")\nsys.exit(sys.argv[1:] and "no luck")'
    )
    with pytest.raises(RuntimeError, match='script.py --x ended with code 1:\nno luck'):
        measuring.run_apart(str(script), '--x')
    script.write_text('print("noise")\nprint([1, 2])')
    assert measuring.run_apart(str(script)) == [1, 2]


@pytest.mark.parametrize('short', [False, True])
def test_parts_have_cases_and_contestants(short):
    args = speed.parse_args(['--short'] if short else [])
    assert args.part == ['layer', 'model', 'start']
    for name, part in speed.PARTS.items():
        floors = set(map(part.floor, part.names)) if callable(part.floor) else None
        assert (floors or {part.floor}) <= set(part.names)
        cases = part.cases(args)
        assert {case.part for case in cases} == {name}
        tokens = [case.tokens for case in cases if case.mode == 'infer']
        assert tokens == sorted(tokens), 'small ones first'
    assert args.repeats == (4 if short else 7)


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--cases', 'infer:14'], '--cases takes mode:side:batch'),
        (['--cases', 'run:14:1'], '--cases takes mode:side:batch'),
        (['--repeats', '0'], 'numbers from 1 on'),
        (['--part', 'layers'], "invalid choice: 'layers'"),
        (['--cpu-time', '--device', 'cuda'], 'for --device cpu'),
    ],
)
def test_bad_options(argv, words, capsys):
    with pytest.raises(SystemExit):
        speed.parse_args(argv)
    assert words in capsys.readouterr().err


def test_layer_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, 'LEAST', 0)
    argv = ['--part', 'layer', 'model', '--grids', '3', '4', '--repeats', '2']
    names = [name for name in speed.LAYERS if name != 'flex']
    argv += ['--no-memory', '--names', *names]  # and none of 'model'
    monkeypatch.setattr(sys, 'argv', ['speed.py', *argv])
    speed.main([*argv, '--out-dir', str(tmp_path), '--threads', '1'])
    with open(tmp_path / 'speed.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['part'] for row in rows} == {'layer'}
    assert [row['name'] for row in rows] == names * 4
    assert {(row['mode'], row['tokens']) for row in rows} == {
        (mode, tokens) for mode in ('infer', 'train') for tokens in ('9', '16')
    }
    for row in rows:
        assert float(row['ms']) > 0
        assert row['name'] != 'sdpa' or float(row['ratio']) == 1
    assert '**layer, train, 16 tokens' in capsys.readouterr().out
    assert (tmp_path / 'speed.png').exists()


@pytest.mark.parametrize(
    'name',
    # timm comes with requirements/bench.txt alone
    [
        n
        for p in ('positions', 'sparse')
        for n in speed.PARTS[p].names
        if 'timm' not in n
    ],
)
def test_positions_and_masks_run(name):
    """Each contestant of the two parts does its work once, on two patches."""
    part = 'positions' if name in speed.PARTS['positions'].names else 'sparse'
    for mode in ('infer', 'train'):
        case = speed.Case(part, mode, 2, 1, 'fp32', 'cpu')
        speed.PARTS[part].build(name, case)()


def test_shipped_classifiers(tmp_path, capsys, monkeypatch):
    """Two of them, one without a prior to deploy, in one table."""
    path = speed.Path(speed.__file__).parents[1] / 'configs/classification/metafile.yml'
    listed = yaml.safe_load(path.read_text())['Models']
    assert {model['Name'] for model in listed} == set(speed.SHIPPED)
    monkeypatch.setattr(speed, 'LEAST', 0)
    names = list(speed.SHIPPED[:2])
    argv = ['--part', 'models', '--repeats', '1', '--names', *names]
    monkeypatch.setattr(sys, 'argv', ['speed.py', *argv])
    speed.main([*argv, '--out-dir', str(tmp_path), '--threads', '1'])
    with open(tmp_path / 'speed.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['name'], row['batch']) for row in rows] == [
        (names[0], '1'),
        (names[0], '8'),
        (f'{names[0]}, deploy form', '1'),
        (names[1], '1'),
        (names[1], '8'),
    ]
    assert {(row['px'], row['tokens'], row['part']) for row in rows} == {
        ('24', '36', 'models')
    }
    assert all(float(row['ms']) > 0 for row in rows)
    table = (tmp_path / 'speed.md').read_text()
    assert '**models, fp32**' in table
    with_prior, without = table.splitlines()[-2:]
    ms, many, deployed = (float(row['ms']) for row in rows[:3])
    rate = 8000 / many
    rate = f'{rate:.1f}' if rate < 100 else f'{rate:.0f}'
    assert with_prior == f'| {names[0]} | 24 | {ms:.1f} | {deployed:.1f} | {rate} |'
    assert without.startswith(f'| {names[1]} | 24 | ')
    assert '|  |' in without
    assert not (tmp_path / 'speed.png').exists(), 'nothing to draw against tokens'


def test_shipped_classifiers_are_deployed(monkeypatch):
    case = speed.Case('models', 'infer', 0, 1, 'fp32', 'cpu')
    monkeypatch.setattr(speed, 'inference', lambda net, images, case: (net, images))
    own, side, runs = speed.build_shipped(speed.SHIPPED[0], case)
    assert (own.grid, side) == (6, 24)
    kinds = {}
    for (name, batch), (net, images) in runs.items():
        assert images.shape == (batch, 3, 24, 24)
        assert net(images).shape == (batch, 10)
        prior = net.func.backbone.layers[0].attn.prior
        kinds[name.removeprefix(speed.SHIPPED[0]), batch] = type(prior).__name__
    assert kinds == {
        ('', 1): 'MLPSpatialPrior',
        ('', 8): 'MLPSpatialPrior',
        (', deploy form', 1): 'ConstantSpatialPrior',
    }


def test_growth_comes_with_the_masks(tmp_path, monkeypatch):
    """Its time is for 1,024 tokens, whatever the grid."""
    assert speed.parse_args(['--part', 'sparse']).part == ['sparse', 'growth']
    few = ['--part', 'sparse', '--cases', 'infer:2:1']
    assert speed.parse_args(few).part == ['sparse']
    names = ['layer: near keys, 1024 tokens', 'layer: near keys, 2304 tokens']
    assert set(names) <= set(speed.GROWTH)
    monkeypatch.setattr(
        speed, 'time_in_turns', lambda timers, *_: {name: [0.5, 0.5] for name in timers}
    )
    argv = ['--part', 'growth', '--names', *names, '--no-memory', '--threads', '1']
    speed.main([*argv, '--repeats', '2', '--out-dir', str(tmp_path)])
    with open(tmp_path / 'speed.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['name'] for row in rows] == names
    assert [float(row['ms']) for row in rows] == pytest.approx([500, 500 / 2.25])
    assert float(rows[1]['ratio']) == pytest.approx(1 / 2.25)


def test_picture_before_and_after(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmseg.models')
    case = speed.Case('segment', 'infer', 2, 1, 'fp32', 'cpu')
    assert (case.sides, case.tokens) == ((2, 4), 8)
    monkeypatch.setitem(
        speed.PARTS,
        'segment',
        speed.PARTS['segment']._replace(cases=lambda args: [case]),
    )
    argv = ['--part', 'segment', '--no-memory', '--threads', '1', '--repeats', '1']
    speed.main([*argv, '--out-dir', str(tmp_path)])
    with open(tmp_path / 'speed.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['name'] for row in rows] == list(speed.SEGMENT)
    assert all(float(row['ms']) > 0 for row in rows)
    assert '8 tokens (32 x 64 px)' in capsys.readouterr().out
