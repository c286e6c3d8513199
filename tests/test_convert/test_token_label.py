"""Converted models with both heads, in the classifier that has them."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from PIL import Image

from spvit_mm.convert import convert_file

from .source_models import as_saved, classify, make_state
from .test_convert import SMALL, TOLERANCE, options_of


@pytest.fixture(params=['spvit', 'lvvit', 'spvit without SP-SA', 'spvit, grid 3 x 5'])
def converted(request, tmp_path):
    spec = SMALL[request.param]
    state = make_state(spec)
    torch.save(dict(state_dict=as_saved(state)), tmp_path / 'source.pth')
    out = tmp_path / 'out.pth'
    convert_file(tmp_path / 'source.pth', out, options=options_of(spec))
    return spec, state, out


def test_logits_equal_the_source(converted):
    spec, state, out = converted
    cfg = Config.fromfile(out.with_suffix('.py'))
    model = MODELS.build(dict(cfg.model, _scope_='mmpretrain'))
    model.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)
    model.eval()
    images = torch.randn(2, 3, *spec.img_size)
    with torch.no_grad():
        got = model.head(model.extract_feat(images))
    want = classify(spec, state, images.double())
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()


def test_written_config_tests_and_trains(converted, tmp_path):
    """The config as written, with a folder of pictures in place of ImageNet."""
    spec, _, out = converted
    for name in 'abcdefg':
        for root in ('data', 'maps'):
            (tmp_path / root / name).mkdir(parents=True)
        Image.new('RGB', (90, 70), (ord(name), 50, 9)).save(
            tmp_path / 'data' / name / '1.png'
        )
        label_map = torch.stack((torch.rand(5, 6, 6), torch.randint(7, (5, 6, 6))))
        torch.save(label_map.half(), tmp_path / 'maps' / name / '1.pt')

    cfg = Config.fromfile(out.with_suffix('.py'))
    images = dict(type='CustomDataset', data_root=str(tmp_path / 'data'))
    cfg.train_dataloader.dataset.dataset = images
    cfg.train_dataloader.dataset.label_root = str(tmp_path / 'maps')
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset = dict(images, pipeline=loader.dataset.pipeline)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    cfg.work_dir = str(tmp_path / 'work')
    cfg.val_evaluator = cfg.test_evaluator = dict(type='Accuracy', topk=(1,))
    runner = Runner.from_cfg(cfg)
    assert 0 <= runner.test()['accuracy/top1'] <= 100
    want = torch.load(out, weights_only=True)['state_dict']
    got = runner.model.state_dict()
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[key], want[key]) for key in want)

    Runner.from_cfg(Config(dict(cfg, experiment_name='train'))).train()
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()
