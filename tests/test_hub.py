import numpy as np
import torch
from mmengine.fileio import load
from mmpretrain import ImageClassificationInferencer, get_model, list_models
from mmpretrain.apis.model import ModelHub

from spvit_mm.utils.hub import MIM_ROOT, register_models


def metafile_models():
    models = []
    for name in load(str(MIM_ROOT / 'model-index.yml'))['Import']:
        models += load(str(MIM_ROOT / name))['Models']
    return models


def test_names_are_ours_alone():
    names = [model['Name'] for model in metafile_models()]
    assert len(set(names)) == len(names)
    for name in names:
        assert name == name.lower()
        assert name.startswith(('spvit-', 'sp-deit-'))


def test_registering_again_adds_nothing():
    before = dict(ModelHub._models_dict)
    assert register_models() == []
    assert before == ModelHub._models_dict


def test_models_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'spvit-small_8xb128-300e_in1k' in list_models('spvit-*')
    model = get_model('sp-deit-tiny_1xb128-200e_cifar10')
    assert model.backbone.num_spsa_layers == 10
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).__len__() == 1


def test_mmpretrains_own_models_still_work():
    assert len(list_models()) > len(metafile_models())
    assert get_model('deit-tiny_4xb256_in1k').backbone.embed_dims == 192


def test_inferencer_by_name():
    inferencer = ImageClassificationInferencer('spvit-mini_1xb64-50e_digits')
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    (result,) = inferencer(image)
    assert result['pred_class'] in [str(digit) for digit in range(10)]
    assert result['pred_scores'].shape == (10,)


def test_metafile_parameters_are_the_models():
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device('meta'):
        for entry in metafile_models():
            if entry['Config'].startswith('configs/segmentation'):
                continue
            cfg = Config.fromfile(str(MIM_ROOT / entry['Config']))
            model = MODELS.build(cfg.model)
            count = sum(p.numel() for p in model.parameters())
            assert count == entry['Metadata']['Parameters'], entry['Name']
