"""The code of docs/own_prior.md, run as it stands there."""

import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

PAGE = Path(__file__).parents[1] / 'docs/own_prior.md'


@pytest.fixture
def code(tmp_path, monkeypatch):
    blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    (tmp_path / 'my_priors.py').write_text(blocks[0])
    (tmp_path / 'config.py').write_text(blocks[1])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / 'config.py', blocks[0]
    MODELS._module_dict.pop('GaussianSpatialPrior', None)
    sys.modules.pop('my_priors', None)


def test_a_prior_of_your_own(code, mmpretrain_scope):
    path, source = code
    body = source.split('class GaussianSpatialPrior')[1].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 10, 'ten lines'
    model = MODELS.build(Config.fromfile(str(path)).model)
    model.init_weights()
    prior = model.backbone.layers[0].attn.prior
    assert type(prior).__name__ == 'GaussianSpatialPrior'
    assert torch.equal(prior((2, 3)), torch.ones(3, 3, 5))
    torch.nn.init.ones_(prior.height)
    expected = 1 + torch.exp(torch.tensor(-((5**0.5 / 3) ** 2)))
    torch.testing.assert_close(prior((2, 3))[0, 2, 4], expected)
    assert model(torch.rand(1, 3, 48, 32)).shape == (1, 1000)
