import importlib.util
from pathlib import Path

import pytest

from spvit_mm.utils import UserError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location(
    'resolution', ROOT / 'benchmarks/resolution.py'
)
resolution = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resolution)


def test_sizes_are_whole_patches():
    assert resolution.sizes_of((64, 96), 8)[:4] == [
        (40, 64),
        (64, 96),
        (96, 144),
        (128, 192),
    ]


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['digits', '--iters', '50'], '--iters must be above 50'),
        (['digits', '--seeds', '0'], '--seeds must be at least 1'),
        (['cifar10', '--data-root', '/nowhere'], 'train/CLASS.*got /nowhere'),
    ],
)
def test_bad_arguments(argv, words):
    with pytest.raises(UserError, match=words):
        resolution.main(argv)


@pytest.mark.slow
def test_scenes_are_evaluated_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resolution, 'SCALES', [(1, 1), (2, 2)])
    monkeypatch.setattr(resolution, 'ASPECTS', [])
    argv = ['scenes', '--iters', '201', '--work-dir', str(tmp_path / 'runs')]
    argv += ['--out', str(tmp_path / 'out'), '--data-root', str(tmp_path / 'scenes')]
    argv += ['--cfg-options', 'train_dataloader.batch_size=2']
    argv += [
        'train_dataloader.dataset.num_scenes=8',
        'test_dataloader.dataset.num_scenes=4',
    ]
    resolution.main(argv)
    first = capsys.readouterr().out
    assert 'scenes, canvas: mIoU' in first
    rows = (tmp_path / 'out.csv').read_text().splitlines()
    assert len(rows) == 1 + len(resolution.VARIANTS) * 3

    monkeypatch.setattr(resolution.Runner, 'train', None)  # it would have to be called
    resolution.main(argv)
    tables = [
        text[text.index('scenes, resized') :]
        for text in (first, capsys.readouterr().out)
    ]
    assert tables[0] == tables[1]
    with pytest.raises(UserError, match='results of other settings'):
        resolution.main([*argv, 'optim_wrapper.optimizer.lr=1e-4'])
