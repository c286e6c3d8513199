import re
from pathlib import Path

import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

ROOT = Path(__file__).parents[2]


def test_readme_replaces_an_arch(tmp_path, mmpretrain_scope):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    (text,) = (block for block in blocks if '_delete_' in block)
    config = tmp_path / 'mine.py'
    config.write_text(text.replace("'configs/", f"'{ROOT}/configs/"))
    with torch.device('meta'):
        model = MODELS.build(Config.fromfile(config).model)
    assert len(model.backbone.layers) == 8
    assert model.backbone.embed_dims == model.head.in_channels == 256
    assert sum(layer.takes_grid for layer in model.backbone.layers) == 6
