import json
from unittest.mock import Mock

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from spvit_mm.engine import PriorVisualizationHook
from spvit_mm.explain import collect_priors, head_focus
from spvit_mm.models import MLPSpatialPrior, SPViT

from . import tiny

MORE = """
model.update(backbone=dict(
    type='SPViT', img_size=16, patch_size=4, num_spsa_layers={layers},
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)))
visualizer = dict(type='UniversalVisualizer', vis_backends=[
    dict(type='LocalVisBackend')])
custom_hooks = [dict(type='PriorVisualizationHook', interval={every}, by_epoch={epochs})]
"""


def train(tmp_path, layers=1, every=2, epochs=True, length=3):
    data = tiny.make_data(tmp_path / 'data')
    more = MORE.format(layers=layers, every=every, epochs=epochs)
    path = tiny.write_config(
        tmp_path / 'config.py', data, by_epoch=epochs, length=length, more=more
    )
    cfg = Config.fromfile(path)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.experiment_name = tmp_path.name
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def logged(tmp_path):
    pictures = {p.name: p for p in (tmp_path / 'work').rglob('priors_*.png')}
    (scalars,) = (tmp_path / 'work').rglob('scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    return pictures, [x for x in lines if any(k.startswith('prior/') for k in x)]


def test_logs_start_every_second_epoch_and_the_last(tmp_path):
    runner = train(tmp_path)
    pictures, scalars = logged(tmp_path)
    assert sorted(pictures) == ['priors_0.png', 'priors_2.png', 'priors_3.png']
    assert cv2.imread(str(pictures['priors_3.png'])).std() > 0
    assert [x['step'] for x in scalars] == [0, 2, 3]
    for head in head_focus(collect_priors(runner.model)):
        name = f'prior/layer1_head{head.head}/radius'
        assert scalars[-1][name] == pytest.approx(head.radius, abs=1e-6)


def test_by_iterations(tmp_path):
    train(tmp_path, every=2, epochs=False, length=3)
    assert sorted(logged(tmp_path)[0]) == [
        'priors_0.png', 'priors_2.png', 'priors_3.png',
    ]  # fmt: skip


def test_a_model_without_priors_trains_and_is_told_once(tmp_path):
    train(tmp_path, layers=0)
    (log,) = (tmp_path / 'work').rglob('*.log')
    assert log.read_text().count('ImageClassifier has no spatial prior') == 1
    pictures, scalars = logged(tmp_path)
    assert not pictures
    assert not scalars


@pytest.mark.parametrize('interval', [0, -1, 1.5, '2'])
def test_bad_interval(interval):
    with pytest.raises(ValueError, match='interval'):
        PriorVisualizationHook(interval=interval)


@pytest.mark.parametrize(('images', 'scalars'), [(True, False), (False, True)])
def test_only_switched_on_things_are_logged(images, scalars):
    model = torch.nn.ModuleDict({'prior': MLPSpatialPrior(2)})
    runner = Mock(model=model, epoch=0, iter=0)
    hook = PriorVisualizationHook(images=images, scalars=scalars, grid=(3, 3))
    hook.before_train(runner)
    assert runner.visualizer.add_image.called == images
    assert runner.visualizer.add_scalars.called == scalars


def test_two_priors_of_a_layer_are_two_curves():
    arch = dict(embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=8)
    model = SPViT(arch, img_size=32, attn_cfg=dict(combine='both'))
    hook = PriorVisualizationHook()
    runner = Mock(model=model, epoch=0)
    hook.before_train(runner)
    (values, step), _ = runner.visualizer.add_scalars.call_args
    assert step == 0
    assert {name.split('/')[1] for name in values} == {
        f'layer1_{use}_head{head}' for use in ('multiplied', 'added') for head in (1, 2)
    }


def test_a_model_whose_position_is_no_prior_is_told_so():
    arch = dict(embed_dims=8, num_layers=3, num_heads=2, feedforward_channels=8)
    model = SPViT(arch, img_size=32, attn_cfg=dict(type='RotaryPositionAttention'))
    hook = PriorVisualizationHook()
    runner = Mock(model=model, epoch=0)
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    (message,), _ = runner.logger.warning.call_args
    assert 'position comes from RotaryPositionAttention' in message
    assert not runner.visualizer.add_image.called
