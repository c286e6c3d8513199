"""tools/visualization/show_priors.py, in this process as on the command line."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image

from spvit_mm.apis import run_cli
from spvit_mm.explain import PriorMap, animate_priors

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/classification/spvit-mini_1xb64-50e_digits.py'
BASELINE = ROOT / 'configs/classification/spvit-mini_0spsa_1xb64-50e_digits.py'


def show_priors(*argv):
    path = ROOT / 'tools/visualization/show_priors.py'
    spec = importlib.util.spec_from_file_location('show_priors', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_cli(module.main, 'show_priors.py', [str(arg) for arg in argv])


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


def test_two_priors_of_a_layer(checkpoint, tmp_path, capsys):
    config = tmp_path / 'both.py'
    both = "model = dict(backbone=dict(attn_cfg=dict(combine='both')))"
    config.write_text(f"_base_ = '{CONFIG}'\n{both}\n")
    show_priors(config, checkpoint(config))
    printed = capsys.readouterr().out
    assert 'layer 2, added' in printed
    assert 'The priors of 3 SP-SA layers are drawn' in printed


def test_draws_for_another_grid(checkpoint, tmp_path):
    show_priors(CONFIG, checkpoint(CONFIG), '--grid', 3, 8, '--out', tmp_path / 'p.png')
    assert (tmp_path / 'p.png').is_file()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('nowhere.py', 'x.pth'), 'The config nowhere.py cannot be read'),
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


@pytest.fixture
def trained(tmp_path, mmpretrain_scope):
    """Checkpoints of a model whose priors move."""
    model = MODELS.build(Config.fromfile(str(CONFIG)).model)
    paths = []
    for epoch in (1, 2, 3):
        paths.append(tmp_path / f'epoch_{epoch}.pth')
        torch.save(dict(state_dict=model.state_dict()), paths[-1])
        for layer in model.backbone.layers[:3]:
            torch.nn.init.normal_(layer.attn.prior.w2)
    return paths


def test_animates_a_frame_for_each_checkpoint(trained, tmp_path):
    out = tmp_path / 'new folder/priors.gif'
    show_priors(CONFIG, *trained, '--out', out)
    with Image.open(out) as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert('RGB')).astype(int))
    assert len(frames) == 3
    # the maps themselves, below the title
    below = [frame[frame.shape[0] // 4 :] for frame in frames]
    for one, other in zip(below, below[1:], strict=False):
        assert (abs(one - other).max(axis=-1) > 30).mean() > 0.05
    assert out.with_suffix('.csv').is_file()


def test_frames_share_one_colour_scale(trained):
    spans = (1.0, 3.0)
    steps = {
        str(span): [PriorMap('layer 1', np.full((1, 5, 5), 1 + span))] for span in spans
    }
    small, large = animate_priors(steps)
    assert small.shape == large.shape
    height, width, _ = small.shape
    # The maximum is dark red; a third of it is lighter on the same scale.
    spot = (height // 2, width // 3)
    assert small[spot].astype(int).sum() > large[spot].astype(int).sum() + 100


def test_animation_of_different_models_is_refused():
    maps = [PriorMap('layer 1', np.ones((1, 5, 5)))]
    other = [PriorMap('layer 1', np.ones((2, 5, 5)))]
    with pytest.raises(ValueError, match='a and b differ in layers, heads or grid'):
        animate_priors({'a': maps, 'b': other})
    with pytest.raises(ValueError, match='two checkpoints or more, got 1'):
        animate_priors({'a': maps})


@pytest.mark.parametrize(
    ('count', 'out', 'message'),
    [
        (2, 'p.mp4', 'p.mp4 must end in .png or .gif'),
        (1, 'p', 'p must end in .png or .gif'),
        (1, 'p.gif', 'got a single one'),
        (2, f'{CONFIG}/p.gif', 'is not a folder'),
        (2, str(ROOT), 'is a folder'),
    ],
)
def test_bad_out(trained, count, out, message, capsys):
    with pytest.raises(SystemExit) as error:
        show_priors(CONFIG, *trained[:count], '--out', out)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
