"""The code of docs/own_prior.md, run as it stands there."""

import sys
from pathlib import Path

import pytest
import torch
from mmpretrain.registry import MODELS

from spvit_mm.apis import build_model, load_config
from spvit_mm.utils import UserError
from tests.pages import read_blocks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """The page's code; its file of priors and the configs are in the working folder."""
    blocks = [block.text for block in read_blocks('docs/own_prior.md', 'python')]
    (tmp_path / 'my_priors.py').write_text(blocks[0])
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    yield blocks
    MODELS._module_dict.pop('GaussianSpatialPrior', None)
    sys.modules.pop('my_priors', None)


def model_of(text):
    Path('config.py').write_text(text)
    return build_model(load_config('config.py'))


def test_a_prior_of_your_own(blocks):
    body = blocks[0].split('class GaussianSpatialPrior')[1].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 10, 'ten lines'
    model = model_of(blocks[1])
    model.init_weights()
    prior = model.backbone.layers[0].attn.prior
    assert type(prior).__name__ == 'GaussianSpatialPrior'
    assert torch.equal(prior((2, 3)), torch.ones(3, 3, 5))
    torch.nn.init.ones_(prior.height)
    expected = 1 + torch.exp(torch.tensor(-((5**0.5 / 3) ** 2)))
    torch.testing.assert_close(prior((2, 3))[0, 2, 4], expected)
    assert model(torch.rand(1, 3, 48, 32)).shape == (1, 1000)


def test_it_takes_the_place_of_another(blocks):
    prior = model_of(blocks[2]).backbone.layers[0].attn.prior
    assert type(prior).__name__ == 'GaussianSpatialPrior'
    with pytest.raises(UserError) as error:
        model_of(blocks[2].replace('_delete_=True, ', ''))
    assert "unexpected keyword argument 'init'" in str(error.value)
    assert str(error.value).count('unless the dict says _delete_=True.') == 1
