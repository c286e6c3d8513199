"""Every command that takes a config takes --cfg-options, which reaches its model."""

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

from tests.test_engine.tiny import make_images
from tests.test_tools.test_train_test import ROOT, TOOLS, command, fails

CONFIG = ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'
OPTIONS = ('--cfg-options', 'model.head.num_classes=7')
COMMANDS = sorted(str(path.relative_to(TOOLS)) for path in TOOLS.rglob('*.py'))
TAKES = {
    'analysis/binarize_priors.py': (),
    'deploy/export.py': ('OUT.onnx',),
    'model_converters/reparameterize_model.py': ('OUT.pth',),
    'visualization/show_attention.py': ('--query', 1, 1),
    'visualization/show_priors.py': (),
    'visualization/show_relevance.py': (),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_it_is_there(name, capsys):
    with pytest.raises(SystemExit):
        command(name, '--help')
    lines = capsys.readouterr().out.splitlines()
    takes_config = any(line.startswith(('  config ', '  --config ')) for line in lines)
    assert any(line.startswith('  --cfg-options ') for line in lines) == takes_config


def test_brackets_that_do_not_close(capsys):
    line = fails(capsys, 'train.py', CONFIG, '--cfg-options', 'model.out_indices=[1,2')
    assert '--cfg-options takes key=value pairs (Imbalanced brackets' in line


@pytest.mark.parametrize(('name', 'arguments'), TAKES.items())
def test_it_changes_the_model(name, arguments, tmp_path, capsys, mmpretrain_scope):
    path = tmp_path / 'c.pth'
    model = MODELS.build(Config.fromfile(str(CONFIG)).model)
    torch.save(dict(state_dict=model.state_dict()), path)
    arguments = [str(x).replace('OUT', f'{tmp_path}/out') for x in arguments]
    line = fails(capsys, name, CONFIG, path, *arguments, *OPTIONS)
    assert 'size mismatch for head.layers.head.weight' in line


def test_it_changes_what_is_counted_and_the_teacher(tmp_path, capsys, mmpretrain_scope):
    command('analysis/get_flops.py', CONFIG, *OPTIONS)
    ten, seven = (MODELS.build(Config.fromfile(str(CONFIG)).model) for _ in range(2))
    count = sum(p.numel() for p in ten.parameters()) - 3 * (64 + 1)
    assert f'({count:,})' in capsys.readouterr().out

    seven.head.layers.head = torch.nn.Linear(64, 7)
    torch.save(dict(state_dict=seven.state_dict()), tmp_path / 'c.pth')
    make_images(tmp_path / 'images')
    line = fails(
        capsys, 'dataset_converters/generate_token_labels.py', CONFIG,
        tmp_path / 'c.pth', tmp_path / 'images', tmp_path / 'maps', *OPTIONS,
    )  # fmt: skip
    assert 'knows 7 classes' in line
