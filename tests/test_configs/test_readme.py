"""The documents name configs that exist, and their examples build."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS

from spvit_mm.apis import load_config
from spvit_mm.utils import UserError
from tests.pages import read_blocks

from .small import ROOT

DOCUMENTS = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]


@pytest.fixture
def example(tmp_path):
    """Reads the config in a document: the one code block with a word of it."""

    def read(document, word):
        (text,) = (x for _, x in read_blocks(document, 'python') if word in x)
        path = tmp_path / 'mine.py'
        path.write_text(text.replace("'configs/", f"'{ROOT}/configs/"))
        return Config.fromfile(path)

    return read


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_configs_that_a_document_names_exist(document):
    for path in re.findall(r'configs/[\w/.-]+\.py', document.read_text()):
        assert (ROOT / path).is_file(), path


def test_readme_replaces_an_arch(example, mmpretrain_scope):
    cfg = example('README.md', '_delete_')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert len(model.backbone.layers) == 8
    assert model.backbone.embed_dims == model.head.in_channels == 256
    assert sum(layer.takes_grid for layer in model.backbone.layers) == 6


def test_readme_inherits_from_the_installed_package(example, tmp_path, monkeypatch):
    """Found from any folder, and by mmengine alone."""
    monkeypatch.chdir(tmp_path)
    cfg = example('README.md', '__import__')
    assert cfg.model.backbone.arch == 'deit-small'
    # mmengine has a list of the packages that it takes `package::path` of.
    inherits = tmp_path / 'other.py'
    inherits.write_text("_base_ = 'spvit_mm::classification/any.py'")
    with pytest.raises(UserError, match=r'__import__\("spvit_mm"\).* in place of'):
        load_config(str(inherits))


def test_a_config_of_mmsegmentation(example):
    pytest.importorskip('mmseg.models')
    cfg = example('docs/segmentation.md', 'upernet_vit')
    with DefaultScope.overwrite_default_scope('mmseg'), torch.no_grad():
        model = MODELS.build({**cfg.model, '_scope_': 'mmseg'}).eval()
        logits = model(torch.rand(1, 3, 96, 64), mode='tensor')
    assert type(model.backbone).__name__ == 'SPViT'
    assert logits.shape == (1, 150, 24, 16)


def test_segmentation_takes_other_classes(example):
    pytest.importorskip('mmseg.models')
    cfg = example('docs/segmentation.md', 'metainfo')
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
        model = MODELS.build({**cfg.model, '_scope_': 'mmseg'})
    assert model.decode_head.conv_seg.out_channels == 3
    assert model.auxiliary_head.conv_seg.out_channels == 3
    for split in ('train', 'val', 'test'):
        metainfo = cfg[f'{split}_dataloader'].dataset.metainfo
        assert metainfo.classes == ('paper', 'ink', 'stamp')
