"""The tools that show something, in this process as on the command line."""

import csv
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image

from spvit_mm.apis import run_cli

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'
BASELINE = ROOT / 'configs/classification/spvit-mini_0spsa_1xb64-50e_digits.py'


def run(tool, *argv):
    path = ROOT / 'tools' / tool
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_cli(module.main, path.name, [str(arg) for arg in argv])


@pytest.fixture
def checkpoint(tmp_path, mmpretrain_scope):
    def save(config, name=None):
        model = MODELS.build(Config.fromfile(str(config)).model)
        for param in model.parameters():
            param.data += 0.02 * torch.randn_like(param)
        path = tmp_path / f'{name or config.stem}.pth'
        torch.save(dict(state_dict=model.state_dict()), path)
        return path

    return save


def test_priors_over_training_and_side_by_side(checkpoint, tmp_path, capsys):
    first, second = checkpoint(CONFIG, 'epoch_1'), checkpoint(CONFIG, 'epoch_2')
    run('visualization/show_priors.py', CONFIG, first, second)
    strip = cv2.imread(str(tmp_path / 'priors.png'))
    assert strip.shape[0] > 1.5 * strip.shape[1], 'one row a head, one column a step'
    with open(tmp_path / 'priors.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(r['layer'], r['head']) for r in rows][:5] == [
        *(('layer 1', str(h)) for h in (1, 2, 3, 4)),
        ('layer 2', '1'),
    ]
    assert 'radius' in capsys.readouterr().out
    out = tmp_path / 'both.png'
    run(
        'visualization/show_priors.py', CONFIG, first, '--compare', CONFIG, second,
        '--out', out,
    )  # fmt: skip
    both = cv2.imread(str(out))
    assert both.shape[1] > both.shape[0]


def test_attention_of_a_patch(checkpoint, tmp_path, capsys):
    path = checkpoint(CONFIG)
    run('visualization/show_attention.py', CONFIG, path, '--query', 2, 3)
    pictures = sorted((tmp_path / 'attention').glob('*.png'))
    assert [p.name for p in pictures] == [
        f'layer{i}_row2_column3.png' for i in (1, 2, 3, 4)
    ]
    # rows: content, prior, product, attention; and without a prior two of them
    assert cv2.imread(str(pictures[0])).shape[0] > cv2.imread(str(pictures[3])).shape[0]
    with pytest.raises(SystemExit):
        run('visualization/show_attention.py', CONFIG, path, '--query', 6, 0)
    assert 'a row in 0..5' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(
            'visualization/show_attention.py',
            CONFIG,
            path,
            *['--query', '0', '0', '--layers', '5'],
        )
    assert '--layers takes numbers in 1..4, got [5]' in capsys.readouterr().err
    # Layers after the last one that is given out are not run.
    early, out = tmp_path / 'early.py', tmp_path / 'early'
    backbone = dict(num_spsa_layers=1, cls_token_layer=1, out_indices=[1])
    early.write_text(f'_base_ = {str(CONFIG)!r}\nmodel = dict(backbone={backbone})')
    args = ('--query', 2, 3, '--out-dir', out)
    run('visualization/show_attention.py', early, checkpoint(early), *args)
    assert len(list(out.glob('*.png'))) == 2


def test_mean_attention_with_and_without_priors(checkpoint, tmp_path, capsys):
    far = {}
    for name, config in (('local', CONFIG), ('plain', BASELINE)):
        args = (config, checkpoint(config), '--count', 5, '--out-dir', tmp_path / name)
        run('visualization/show_attention.py', *args)
        assert {p.name for p in (tmp_path / name).iterdir()} == {'mean.png', 'mean.csv'}
        lines = capsys.readouterr().out.splitlines()
        first = next(line for line in lines if line.startswith('layer 1'))
        far[name] = float(first.split()[2])
        assert any(line.startswith('layer 4') for line in lines)
    # This start is local, and a plain ViT starts as good as even (2.67).
    assert far['local'] < 1.5 < 2.5 < far['plain']
    picture = tmp_path / 'digit.png'
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (24, 24, 3)))
    argv = (CONFIG, checkpoint(CONFIG), '--image', picture, '--layers', 2)
    run('visualization/show_attention.py', *argv, '--out-dir', tmp_path / 'one')
    out = capsys.readouterr().out
    assert 'layer 2' in out
    assert 'layer 1' not in out
    with (tmp_path / 'one' / 'mean.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['head'] for row in rows] == ['1', '2', '3', '4']
    assert f'{float(rows[3]["distance"]):.2f}' in out
    with pytest.raises(SystemExit):
        run('visualization/show_attention.py', *argv, '--count', 5)
    assert '--count is for the average' in capsys.readouterr().err


def test_relevance_of_two_models_and_the_table(checkpoint, tmp_path, capsys):
    one, two = checkpoint(CONFIG), checkpoint(BASELINE)
    run(
        'visualization/show_relevance.py', CONFIG, one, '--compare', BASELINE, two,
        '--count', 2, '--perturb', 20,
    )  # fmt: skip
    picture = cv2.imread(str(tmp_path / 'relevance.png'))
    assert picture.shape[1] > 2 * picture.shape[0], 'two rows of five columns'
    with open(tmp_path / 'relevance_perturbation.csv') as file:
        rows = list(csv.DictReader(file))
    kinds = list(dict.fromkeys((r['model'], r['method']) for r in rows))
    assert kinds == [
        (model, method)
        for model in ('spvit-mini', 'spvit-mini_0spsa')
        for method in ('gradient', 'rollout', 'random order')
    ]
    for kind in kinds:
        start = [r for r in rows if (r['model'], r['method']) == kind][0]
        assert start['most_first'] == start['least_first']
    printed = capsys.readouterr().out
    assert 'most first (low is good)' in printed
    assert 'Perturbation test on 20 images' in printed


def test_models_of_one_config_are_told_apart(checkpoint, tmp_path, capsys):
    path = checkpoint(CONFIG)
    run(
        'visualization/show_relevance.py', CONFIG, path, '--compare', CONFIG, path,
        '--count', 1, '--perturb', 500, '--methods', 'gradient',
        '--cfg-options', 'test_dataloader.dataset.indices=3',
    )  # fmt: skip
    assert 'Perturbation test on 3 images' in capsys.readouterr().out
    with open(tmp_path / 'relevance_perturbation.csv') as file:
        models = {row['model'] for row in csv.DictReader(file)}
    assert models == {f'{CONFIG.stem} (1)', f'{CONFIG.stem} (2)'}


def test_relevance_of_image_files(checkpoint, tmp_path):
    path = checkpoint(CONFIG)
    rgb = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / 'rgb.png')
    args = (CONFIG, path, '--methods', 'gradient', '--images')
    run('visualization/show_relevance.py', *args, tmp_path / 'rgb.png')
    assert (tmp_path / 'relevance.png').is_file()


def test_binarized_priors(checkpoint, tmp_path, capsys):
    path = checkpoint(CONFIG)
    args = ('--keep', '0.3', '1', '--mass-batches', '1', '--finetune', '1')
    run('analysis/binarize_priors.py', CONFIG, path, *args)
    with open(tmp_path / 'binarized.csv') as file:
        rows = list(csv.DictReader(file))
    assert [float(r['keep']) for r in rows] == [1, 0.3]
    assert [float(r['offsets']) for r in rows] == pytest.approx([1, 0.3], abs=0.02)
    assert float(rows[1]['finetuned']) > float(rows[1]['accuracy'])
    assert (tmp_path / 'binarized.png').is_file()
    amp = ('--cfg-options', 'optim_wrapper.type=AmpOptimWrapper')
    run('analysis/binarize_priors.py', CONFIG, path, *args, *amp)
    more = ('--by', 'window', '--keep', '0.5', '--mass-batches', '1', '--time')
    more += ('--cfg-options', 'test_dataloader.dataset.indices=60')
    run('analysis/binarize_priors.py', CONFIG, path, *more)
    with open(tmp_path / 'binarized.csv') as file:
        (row,) = csv.DictReader(file)
    assert list(row) == [
        *('keep', 'offsets', 'mass', 'accuracy', 'pairs', 'computed', 'time'),
    ]
    assert float(row['mass']) >= 0.5 > float(row['offsets'])
    assert float(row['offsets']) < float(row['pairs']) < 1
    assert float(row['computed']) == 1, 'the grid is smaller than a tile'
    assert float(row['time']) > 0
    capsys.readouterr()
    for argv, message in [
        (('--keep', '0'), '--keep: takes numbers above 0 up to 1'),
        (('--finetune', '-1'), '--finetune: takes whole numbers from 0 on'),
    ]:
        with pytest.raises(SystemExit):
            run('analysis/binarize_priors.py', CONFIG, path, *argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    'tool', ['visualization/show_relevance.py', 'analysis/binarize_priors.py']
)
def test_name_of_the_picture_is_checked_first(tool, capsys):
    # before the checkpoint, which is none, is opened
    with pytest.raises(SystemExit) as error:
        run(tool, CONFIG, CONFIG, '--out', 'picture.csv')
    assert error.value.code == 2
    assert 'picture.csv must end in .png' in capsys.readouterr().err
