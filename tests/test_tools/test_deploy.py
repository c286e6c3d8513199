"""Deploy form and export, by their command lines."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.model import revert_sync_batchnorm

from spvit_mm.apis import build_model, export, load_config, load_trained_model
from spvit_mm.utils import UserError, whole_file

from .test_train_test import command, fails

REPARAMETERIZE = 'model_converters/reparameterize_model.py'
EXPORT = 'deploy/export.py'
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
        prior=dict(type='LookHereSpatialPrior', views=('right', 'up')),""",
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


def test_a_file_that_differs_is_not_kept(trained, tmp_path, capsys, monkeypatch):
    config, checkpoint, _ = trained
    out = tmp_path / 'a.onnx'
    run = export.run_file
    monkeypatch.setattr(export, 'run_file', lambda *args: run(*args) + 1e-3)
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
