"""Deploy form and export, by their command lines."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmseg.models import SegDataPreProcessor
from torch import nn

from spvit_mm.apis import (
    build_model,
    export,
    load_config,
    load_trained_model,
    reverses_channels,
)
from spvit_mm.utils import UserError, whole_file

from .test_train_test import command, fails

REPARAMETERIZE = 'model_converters/reparameterize_model.py'
EXPORT = 'deploy/export.py'
SHOW_PRIORS = 'visualization/show_priors.py'
CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['spvit_mm'])
data_preprocessor = dict(num_classes=5, mean=[120.0] * 3, std=[60.0] * 3)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SPViT', img_size=32, patch_size=8, with_peg=True, stem='conv',
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=32)),
    head=dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32))
"""
PLAIN = CONFIG.replace("'SPViT'", "'VisionTransformer'").replace(
    "with_peg=True, stem='conv',", ''
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(config, checkpoint, model) with nothing neutral in it."""
    folder = tmp_path_factory.mktemp('deploy')
    config, checkpoint = folder / 'tiny.py', folder / 'trained.pth'
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = build_model(load_config(str(config))).eval()
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, std=1.0 if 'prior' in name else 0.2)
    state = {
        'state_dict': model.state_dict(),
        'meta': {'epoch': 7},
        'optimizer': {'state': {}},
    }
    torch.save(state, checkpoint)
    return config, checkpoint, model


def logits(model, images):
    with torch.no_grad():
        return model(images, mode='tensor')


@pytest.mark.parametrize('grid', [None, (3, 5)])
def test_reparameterize(trained, tmp_path, capsys, grid):
    config, checkpoint, model = trained
    out = tmp_path / 'new' / 'deployed.pth'
    options = ('--grid', *grid) if grid else ()
    command(REPARAMETERIZE, config, checkpoint, out, *options)
    grid = grid or (4, 4)
    printed = capsys.readouterr().out
    assert f'grid of {grid[0]} x {grid[1]} patches' in printed
    assert 'model.backbone.deploy=True' in printed
    written = torch.load(out)
    assert written['meta'] == {'epoch': 7, 'deploy_grid': grid}
    assert 'optimizer' not in written
    assert [p.name for p in out.parent.iterdir()] == ['deployed.pth']

    cfg = load_config(str(config), {'model.backbone.deploy': True})
    deployed, _ = load_trained_model(cfg, str(out))
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    assert torch.equal(logits(deployed, images), logits(model, images))
    with pytest.raises(UserError, match='deploy=True'):
        load_trained_model(load_config(str(config)), str(out))


def test_a_folded_checkpoint_keeps_its_grid(trained, tmp_path, capsys):
    config, checkpoint, _ = trained
    out, again = tmp_path / 'a.pth', tmp_path / 'b.pth'
    command(REPARAMETERIZE, config, checkpoint, out, '--grid', 3, 5)
    torch.save({**torch.load(out), 'meta': None}, out)
    deployed = ('--cfg-options', 'model.backbone.deploy=True')
    command(REPARAMETERIZE, config, out, again, *deployed)
    assert torch.load(again)['meta'] == {'deploy_grid': (3, 5)}
    elsewhere = ('--grid', 4, 4, *deployed)
    line = fails(capsys, REPARAMETERIZE, config, out, tmp_path / 'c.pth', *elsewhere)
    assert 'deploy form for (3, 5)' in line
    line = fails(capsys, SHOW_PRIORS, config, out, *elsewhere)
    assert 'this model was deployed for 3 x 5' in line


def test_reparameterize_to_safetensors(trained, tmp_path):
    config, checkpoint, model = trained
    out = tmp_path / 'deployed.safetensors'
    command(REPARAMETERIZE, config, checkpoint, out)
    cfg = load_config(str(config), {'model.backbone.deploy': True})
    deployed, _ = load_trained_model(cfg, str(out))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(deployed, images), logits(model, images))


@pytest.mark.parametrize('name', [REPARAMETERIZE, EXPORT])
def test_nothing_is_overwritten(trained, tmp_path, capsys, name):
    config, checkpoint, _ = trained
    out = tmp_path / ('out.pth' if name == REPARAMETERIZE else 'out.pt2')
    out.write_text('precious')
    assert 'exists' in fails(capsys, name, config, checkpoint, out)
    assert out.read_text() == 'precious'
    assert 'must end in' in fails(capsys, name, config, checkpoint, tmp_path / 'a.txt')
    folder = tmp_path / 'a.pth'
    folder.mkdir()
    assert 'is a folder' in fails(capsys, name, config, checkpoint, folder)
    missing = tmp_path / 'no.pth'
    new = tmp_path / f'new{out.suffix}'
    assert 'does not exist' in fails(capsys, name, config, missing, new)
    assert not new.exists()


def test_force_replaces_the_file(trained, tmp_path):
    config, checkpoint, _ = trained
    out = tmp_path / 'out.pth'
    out.write_text('old')
    command(REPARAMETERIZE, config, checkpoint, out, '--force')
    assert 'state_dict' in torch.load(out)


def test_force_does_not_replace_the_trained_weights(trained, tmp_path, capsys):
    config, checkpoint, _ = trained
    before = checkpoint.read_bytes()
    link = tmp_path / 'link.pth'
    link.symlink_to(checkpoint)
    line = fails(capsys, REPARAMETERIZE, config, checkpoint, link, '--force')
    assert 'would replace what it is made of' in line
    assert checkpoint.read_bytes() == before


def test_a_model_of_grey_images(tmp_path, capsys):
    config, checkpoint = tmp_path / 'grey.py', tmp_path / 'grey.pth'
    text = CONFIG.replace("'SPViT', ", "'SPViT', in_channels=1, ")
    config.write_text(text.replace('] * 3', ']'))
    model = build_model(load_config(str(config)))
    torch.save(model.state_dict(), checkpoint)
    command('analysis/get_flops.py', config)
    assert 'Input shape: (1, 32, 32)' in capsys.readouterr().out
    command(EXPORT, config, checkpoint, tmp_path / 'grey.pt2')
    assert '1 images of 1 x 32 x 32' in capsys.readouterr().out


def test_a_model_without_deploy_form(tmp_path, capsys):
    config, checkpoint = tmp_path / 'plain.py', tmp_path / 'plain.pth'
    config.write_text(PLAIN)
    model = build_model(load_config(str(config)))
    torch.save(model.state_dict(), checkpoint)
    line = fails(capsys, REPARAMETERIZE, config, checkpoint, tmp_path / 'out.pth')
    assert 'VisionTransformer' in line
    assert 'deploy form' in line
    # Such a model, too, has its logits.
    command(EXPORT, config, checkpoint, tmp_path / 'out.onnx')


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider']
    )
    return session.run(['logits'], {'images': images.numpy()})[0]


@pytest.mark.parametrize(
    ('options', 'size', 'batches'),
    [
        ((), (32, 32), [1]),
        (('--batch', '2', '--shape', '24', '40'), (24, 40), [2]),
        (('--dynamic-batch',), (32, 32), [1, 2, 5]),
    ],
)
def test_onnx(trained, tmp_path, capsys, options, size, batches):
    config, checkpoint, model = trained
    out = tmp_path / 'model.onnx'
    command(EXPORT, config, checkpoint, out, *options)
    assert 'top-1 the same' in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']
    proto = onnx.load(out)
    assert {node.domain for node in proto.graph.node} == {''}
    for batch in batches:
        images = torch.randn(batch, 3, *size)
        expected = logits(model, images).numpy()
        found = run_onnx(out, images)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        assert (found.argmax(1) == expected.argmax(1)).all()
    if '--dynamic-batch' not in options:
        with pytest.raises(Exception, match='nvalid dimensions'):
            run_onnx(out, torch.randn(7, 3, *size))


SEGMENTOR = """
default_scope = 'mmseg'
custom_imports = dict(imports=['spvit_mm'])
model = dict(
    type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
    backbone=dict(
        type='mmpretrain.SPViT', img_size=32, patch_size=8, out_type='featmap',
        arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=32)),
    decode_head=dict(
        type='FCNHead', in_channels=32, channels=8, num_convs=1, num_classes=5,
        in_index=-1, norm_cfg=dict(type='SyncBN')))
"""
GATED = CONFIG.replace(
    'with_peg=True,', "attn_cfg=dict(type='GatedPositionalAttention', init='random'),"
)


ROTARY = GATED.replace(
    "'GatedPositionalAttention', init='random'", "'RotaryPositionAttention'"
)
ADD = CONFIG.replace('with_peg=True,', "attn_cfg=dict(combine='add', strength=2.0),")
# Two priors of each layer, which mask, and a learned score.
BOTH = CONFIG.replace(
    'with_peg=True,',
    """
        attn_cfg=dict(combine='both', init_score=1.0), qkv_bias=False,
        prior=dict(type='WindowSpatialPrior', window=5, masked=True),""",
)


def save_random(folder, text):
    """(config, checkpoint, model) of a config with nothing neutral in it."""
    config, checkpoint = folder / 'tiny.py', folder / 'tiny.pth'
    config.write_text(text)
    model = build_model(load_config(str(config))).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    torch.save(model.state_dict(), checkpoint)
    return config, checkpoint, model


@pytest.mark.parametrize('text', [ADD, BOTH])
def test_all_that_meets_the_scores_is_folded(tmp_path, text):
    config, checkpoint, model = save_random(tmp_path, text)
    out = tmp_path / 'deployed.pth'
    command(REPARAMETERIZE, config, checkpoint, out, '--grid', 3, 5)
    cfg = load_config(str(config), {'model.backbone.deploy': True})
    deployed, _ = load_trained_model(cfg, str(out))
    images = torch.randn(2, 3, 24, 40)
    assert torch.equal(logits(deployed, images), logits(model, images))


@pytest.mark.parametrize('text', [SEGMENTOR, GATED, ROTARY, BOTH])
def test_onnx_of_other_models(tmp_path, text):
    if text == SEGMENTOR:
        pytest.importorskip('mmseg.models')  # with mmcv-lite it cannot be imported
    config, checkpoint, model = save_random(tmp_path, text)
    shape = ('--shape', 24, 40, '--dynamic-batch')
    command(EXPORT, config, checkpoint, tmp_path / 'tiny.onnx', *shape)
    images = torch.randn(3, 3, 24, 40)
    expected = logits(revert_sync_batchnorm(model), images).numpy()
    found = run_onnx(tmp_path / 'tiny.onnx', images)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


# An attention of each kind that asks for the grid.
ANY_GRID = CONFIG.replace(
    'with_peg=True,',
    """
        num_spsa_layers=3, cls_token_layer=1, layer_cfgs=[
            dict(attn_cfg=dict(
                type='SpatialPriorAttention', combine='both',
                prior=dict(type='TableSpatialPrior'))),
            dict(attn_cfg=dict(
                type='SpatialPriorAttention', combine='add',
                prior=dict(type='LookHereSpatialPrior', views=('right', 'up')))),
            dict(attn_cfg=dict(type='RelativePositionAttention', mode='embedding'))],""",
)
UPERNET = """
default_scope = 'mmseg'
custom_imports = dict(imports=['spvit_mm'])
model = dict(
    type='EncoderDecoder', train_cfg=dict(), test_cfg=dict(mode='whole'),
    backbone=dict(
        type='mmpretrain.SPViT', img_size=32, patch_size=8, out_type='featmap',
        out_indices=(0, 1, 2, 3), num_spsa_layers=1,
        prior=dict(type='MLPSpatialPrior', coords='clamped'),
        arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=32)),
    neck=dict(
        type='Feature2Pyramid', embed_dim=32, rescales=[4, 2, 1, 0.5],
        norm_cfg=dict(type='SyncBN')),
    decode_head=dict(
        type='UPerHead', in_channels=[32] * 4, in_index=[0, 1, 2, 3], channels=8,
        pool_scales=(1, 2, 3), num_classes=5, norm_cfg=dict(type='SyncBN')))
"""


@pytest.mark.parametrize(
    ('text', 'options', 'batches'),
    [
        (ANY_GRID, ['--dynamic-batch'], (1, 3)),
        (SEGMENTOR, [], (1,)),
        pytest.param(UPERNET, [], (1,), marks=pytest.mark.slow),
    ],
)
def test_onnx_of_any_size(tmp_path, capsys, text, options, batches):
    config, checkpoint, model = save_random(tmp_path, text)
    out = tmp_path / 'tiny.onnx'
    command(EXPORT, config, checkpoint, out, '--dynamic-size', *options)
    printed = capsys.readouterr().out
    assert printed.count('top-1 the same') == 4 * len(batches)
    assert 'any height x any width' in printed
    assert 'largest difference' in printed
    model = revert_sync_batchnorm(model)
    for size in [(24, 48), (48, 24), (32, 32), (33, 71)]:
        for batch in batches:
            images = torch.randn(batch, 3, *size)
            expected = logits(model, images).numpy()
            assert np.abs(expected).max() > 0.1
            found = run_onnx(out, images)
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not export.HAS_FREE_SIZES, reason='torch < 2.7: refused')
def test_program_of_any_size(tmp_path):
    config, checkpoint, model = save_random(tmp_path, ANY_GRID)
    out = tmp_path / 'tiny.pt2'
    command(EXPORT, config, checkpoint, out, '--dynamic-size')
    run = export.open_file(str(out))
    for size in [(24, 48), (48, 24), (32, 32), (33, 71)]:
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(run(images), logits(model, images))


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg', 'original mmseg'])
def test_reversed_channels_are_known(scope):
    if scope == 'mmpretrain':
        kind = dict(type='mmpretrain.ClsDataPreprocessor')
        plain, turned = (MODELS.build(dict(kind, to_rgb=x)) for x in (False, True))
    else:
        turned, plain = (SegDataPreProcessor(bgr_to_rgb=x) for x in (True, False))
        if scope == 'original mmseg':
            plain, turned = (
                SimpleNamespace(channel_conversion=x) for x in (False, True)
            )
    assert [reverses_channels(x) for x in (plain, turned)] == [False, True]


def test_a_model_in_training_is_exported_as_it_is_in_evaluation():
    model = build_model(Config.fromstring(CONFIG, '.py')).train()
    images = torch.rand(2, 3, 32, 32)
    expected = logits(copy.deepcopy(model).eval(), images)
    exported = export.prepare(model, (32, 32))
    torch.testing.assert_close(exported(images), expected)


def test_one_grid_is_not_any_size(trained, tmp_path, capsys):
    config, checkpoint, _ = trained
    deployed = tmp_path / 'deployed.pth'
    command(REPARAMETERIZE, config, checkpoint, deployed)
    options = ('--dynamic-size', '--cfg-options', 'model.backbone.deploy=True')
    line = fails(capsys, EXPORT, config, deployed, tmp_path / 'a.onnx', *options)
    assert 'deploy form' in line
    assert '--dynamic-size' in line
    assert not (tmp_path / 'a.onnx').exists()


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    'module',
    [
        *(export.FreePooling(nn.AdaptiveAvgPool2d(n)) for n in (1, 2, (3, 6))),
        export.FreePadding(AdaptivePadding((8, 4), (8, 4))),
    ],
)
def test_what_asks_for_a_size_is_replaced(module):
    (original,) = module.children()
    traced = torch.jit.trace(module, torch.randn(2, 3, 13, 9), check_trace=False)
    for size in [(13, 9), (6, 12), (8, 8), (17, 4), (5, 3)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(traced(x), original(x))
        assert torch.equal(module(x), original(x))


class Singular(nn.Module):
    """No operator of ONNX computes it."""

    def forward(self, images):
        return torch.linalg.svd(images)[1]


class Half(nn.Module):
    def forward(self, images):
        return images + images[:, :, : images.shape[2] // 2].mean()


def test_the_operator_that_cannot_be_exported_is_named(tmp_path):
    images = torch.randn(2, 3, 8, 10)
    with pytest.raises(UserError, match='operator aten.*svd'):
        export.save_onnx(Singular().eval(), str(tmp_path / 'a.onnx'), images)


@pytest.mark.skipif(not export.HAS_EXPORT, reason='torch < 2.5 writes no .pt2')
def test_an_image_that_the_file_cannot_take(tmp_path):
    path = str(tmp_path / 'a.pt2')
    export.save_program(Half(), path, torch.randn(2, 3, 8, 10))
    with pytest.raises(UserError, match=r'\(2, 3, 9, 10\)'):
        export.open_file(path)(torch.randn(2, 3, 9, 10))


def test_a_model_that_computes_no_numbers(trained, tmp_path, capsys):
    config, _, model = trained
    state = {**model.state_dict()}
    name = 'backbone.layers.1.ffn.layers.1.weight'
    state[name] = torch.full_like(state[name], 1e38)
    torch.save(state, tmp_path / 'large.pth')
    out = tmp_path / 'a.onnx'
    line = fails(capsys, EXPORT, config, tmp_path / 'large.pth', out)
    assert 'nan or infinity' in line
    assert 'first in the output of backbone.layers.' in line
    assert not out.exists()


def test_images_smaller_than_a_patch(trained, tmp_path, capsys):
    config, checkpoint, _ = trained
    common = (config, checkpoint, tmp_path / 'a.onnx')
    line = fails(capsys, EXPORT, *common, '--shape', 7, 32)
    assert '7 x 32 pixels are smaller than a patch of the model, 8 x 8' in line
    assert 'two positive numbers' in fails(capsys, EXPORT, *common, '--shape', 0)


def test_a_difference_in_the_top_class_shows():
    ours = torch.tensor([[1.0, 2.0, 0.0], [5.0, 0.0, 4.0]])
    same = export.Difference(ours, ours + 1e-3)
    assert same.same_top1
    assert same.largest == pytest.approx(1e-3 / 5, rel=1e-3)
    swapped = ours.clone()
    swapped[0, 0] = 2.0 + 1e-4
    swapped[0, 1] -= 1e-6
    assert not export.Difference(ours, swapped).same_top1


@pytest.mark.skipif(not export.HAS_EXPORT, reason='torch < 2.5: refused, see below')
@pytest.mark.parametrize('dynamic', [False, True])
def test_program(trained, tmp_path, capsys, dynamic):
    config, checkpoint, model = trained
    deployed, out = tmp_path / 'deployed.pth', tmp_path / 'model.pt2'
    command(REPARAMETERIZE, config, checkpoint, deployed, '--grid', 3, 5)
    options = ['--shape', 24, 40, '--cfg-options', 'model.backbone.deploy=True']
    if dynamic:
        options.insert(0, '--dynamic-batch')
    command(EXPORT, config, deployed, out, *options)
    program = torch.export.load(out).module()
    for batch in (1, 4) if dynamic else (1,):
        images = torch.randn(batch, 3, 24, 40)
        torch.testing.assert_close(program(images), logits(model, images))
    # and no other image than that of the deployed grid
    other = (config, deployed, tmp_path / 'b.pt2', *options[-2:])
    line = fails(capsys, EXPORT, *other)
    assert 'deploy form for (3, 5)' in line


def test_mistakes_in_options(trained, tmp_path, capsys):
    config, checkpoint, _ = trained
    common = (EXPORT, config, checkpoint, tmp_path / 'a.onnx')
    assert 'two positive numbers' in fails(capsys, *common, '--shape', 8, 8, 8)
    assert '--opset from 17' in fails(capsys, *common, '--opset', 9)
    both = ('--dynamic-batch', '--batch', 2)
    assert 'not both' in fails(capsys, *common, *both)


def test_missing_packages_are_named(trained, tmp_path, capsys, monkeypatch):
    config, checkpoint, _ = trained
    common = (config, checkpoint, tmp_path / 'a.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    command(EXPORT, *common)
    assert 'Not compared' in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, 'onnx', None)
    line = fails(capsys, EXPORT, *common, '--force')
    assert 'onnx' in line
    assert 'requirements/deploy.txt' in line
    monkeypatch.setattr(export, 'HAS_EXPORT', False)
    line = fails(capsys, EXPORT, config, checkpoint, tmp_path / 'a.pt2')
    assert 'torch >= 2.5' in line


@pytest.mark.parametrize('error', [1e-3, float('nan')])
def test_a_file_that_differs_is_not_kept(trained, tmp_path, capsys, monkeypatch, error):
    config, checkpoint, _ = trained
    out = tmp_path / 'a.onnx'
    opened = export.open_file
    monkeypatch.setattr(
        export, 'open_file', lambda path: lambda x: opened(path)(x) + error
    )
    assert 'differs from the model' in fails(capsys, EXPORT, config, checkpoint, out)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_text('old')

    def write():
        with whole_file(str(path)) as partial:
            with open(partial, 'w') as file:
                file.write('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']
