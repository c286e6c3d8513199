import re

import experiments
import pytest
import resolution


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
        (['digits', '--iters', '50'], '--iters: takes whole numbers from 51 on'),
        (['digits', '--seeds', '0'], '--seeds: takes whole numbers from 1 on'),
        (['cifar10', '--data-root', '/nowhere'], 'train/CLASS.*got /nowhere'),
    ],
)
def test_bad_arguments(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        experiments.run_cli(resolution.main, 'resolution.py', argv)
    assert end.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_tests_are_of_the_size_and_the_rule():
    args = resolution.argparse.Namespace(iters=60, data_root=None, cfg_options=None)
    cases = [('resized', (48, 24))]
    cfg = resolution.read_config('digits', args)
    runs = resolution.plan(cfg, 'digits', cases, seeds=1)
    assert [run.setting for run in runs] == list(resolution.TRAININGS)
    own = runs[-1].config
    assert own.model.backbone.pos_embed is None
    changed = {test.name: experiments.changed(own, test.options) for test in own.tests}
    assert list(changed) == [
        f'prior-{rule}, resized 48x24' for rule in ('raw', 'scaled', 'clamped')
    ]
    for rule, test in zip(('raw', 'scaled', 'clamped'), changed.values(), strict=True):
        assert test.model.backbone.prior.coords == rule
        assert test.model.backbone.prior.init == 'local'
        assert test.test_dataloader.dataset.pipeline[0].scale == (24, 48)


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

    monkeypatch.setattr(experiments, '_start', None)  # it would have to be called
    resolution.main(argv)
    tables = [
        text[text.index('scenes, resized') :]
        for text in (first, capsys.readouterr().out)
    ]
    assert tables[0] == tables[1]
