"""tools/visualization/show_priors.py, in this process as on the command line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

from spvit_mm.engine import launch

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'
BASELINE = ROOT / 'configs/classification/spvit-mini_0spsa_1xb64-50e_digits.py'


def show_priors(*argv):
    path = ROOT / 'tools/visualization/show_priors.py'
    spec = importlib.util.spec_from_file_location('show_priors', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch.run_cli(module.main, 'show_priors.py', [str(arg) for arg in argv])


@pytest.fixture
def checkpoint(tmp_path, mmpretrain_scope):
    def save(config):
        model = MODELS.build(Config.fromfile(str(config)).model)
        path = tmp_path / f'{config.stem}.pth'
        torch.save(dict(state_dict=model.state_dict()), path)
        return path

    return save


def test_draws_beside_the_checkpoint(checkpoint, capsys):
    path = checkpoint(CONFIG)
    show_priors(CONFIG, path)
    out = path.parent / 'priors.png'
    assert out.read_bytes().startswith(b'\x89PNG')
    assert f'3 SP-SA layers are drawn in {out}' in capsys.readouterr().out


def test_draws_for_another_grid(checkpoint, tmp_path):
    show_priors(CONFIG, checkpoint(CONFIG), '--grid', 3, 8, '--out', tmp_path / 'p.png')
    assert (tmp_path / 'p.png').is_file()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('nowhere.py', 'x.pth'), 'The config nowhere.py does not exist'),
        ((CONFIG, 'nowhere.pth'), 'The checkpoint nowhere.pth does not exist'),
        ((CONFIG, str(ROOT)), 'is a folder'),
    ],
)
def test_bad_paths(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        show_priors(*argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_checkpoint_without_priors(checkpoint, capsys):
    path = checkpoint(BASELINE)
    with pytest.raises(SystemExit):
        show_priors(BASELINE, path)
    assert 'no spatial prior: no SP-SA layer' in capsys.readouterr().err


def test_checkpoint_of_another_model(checkpoint, capsys):
    path = checkpoint(BASELINE)
    with pytest.raises(SystemExit):
        show_priors(CONFIG, path)
    err = capsys.readouterr().err
    assert 'is not a checkpoint of this model' in err
    assert 'backbone.layers.0.attn.prior.w1' in err
