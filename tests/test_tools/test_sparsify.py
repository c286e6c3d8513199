"""From a trained model to a sparse one, by its command line."""

from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain import get_model

from spvit_mm.apis import build_model, load_config, load_model, load_trained_model
from spvit_mm.apis import sparsify as api
from spvit_mm.explain import keep_offsets, offset_mass, sparsify

from .test_train_test import command, fails
from .test_visualization import CONFIG, checkpoint  # noqa: F401

TOOL = 'model_converters/sparsify_priors.py'
# Sixty images to train on, and as many to test.
LITTLE = (
    '--mass-batches', 2, '--cfg-options',
    'train_dataloader.dataset.indices=60', 'test_dataloader.dataset.indices=60',
    'train_dataloader.batch_size=30',
)  # fmt: skip
WIDE_CROP = 'train_dataloader.dataset.pipeline.1.crop_size=32'


def logits(model, images):
    with torch.no_grad():
        return model(images, mode='tensor')


@pytest.fixture
def trained(checkpoint):  # noqa: F811
    path = checkpoint(CONFIG)
    content = torch.load(path)
    torch.manual_seed(1)
    for name, value in content['state_dict'].items():
        if 'prior.w2' in name:
            value += torch.randn_like(value) * 0.3
    torch.save({**content, 'meta': {'epoch': 7}}, path)
    return path


def test_what_is_written_is_the_dense_masked_model(trained, tmp_path, capsys):
    out = tmp_path / 'new' / 'sparse.pth'
    command(TOOL, CONFIG, trained, out, '--keep-mass', 0.8, *LITTLE)
    printed = capsys.readouterr().out
    assert 'Grid of 6 x 6 patches, 121 offsets' in printed
    assert 'accuracy/top1: ' in printed
    assert 'ms before' in printed
    assert f'tools/test.py {out.with_suffix(".py")} {out}' in printed
    assert {p.name for p in out.parent.iterdir()} == {'sparse.pth', 'sparse.py'}
    assert torch.load(out)['meta'] == {
        'epoch': 7,
        'sparse': {'keep_mass': 0.8, 'by': 'fewest', 'grid': (6, 6)},
    }

    cfg, plain = load_model(str(CONFIG), str(trained))
    cfg.train_dataloader.dataset.indices, cfg.train_dataloader.batch_size = 60, 30
    masses, grid = offset_mass(plain, api.training_images(cfg, plain, 2))
    _, sparse = load_model(str(out.with_suffix('.py')), str(out))
    for name, (table, mass) in masses.items():
        kept = sparse.get_submodule(name).kept
        assert torch.equal(kept, keep_offsets(table, mass, 0.8, 'fewest'))
        held = (mass * kept).sum((1, 2))
        assert (held >= 0.8 - 1e-9).all()
        assert not kept.all()
        # layer, then offsets (pairs, attention) of each head
        line = next(x for x in printed.splitlines() if x.startswith('layer 1 '))
    assert line.count('(') == 4
    sparsify(plain, masses, 0.8)
    images = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(logits(sparse, images), logits(plain, images))


def test_every_command_takes_it(trained, tmp_path, capsys):
    out, config = tmp_path / 'sparse.pth', tmp_path / 'sparse.py'
    options = ('--keep-mass', 0.7, '--deploy', '--no-test')
    command(TOOL, CONFIG, trained, out, *options, *LITTLE)
    assert 'accuracy' not in capsys.readouterr().out
    _, sparse = load_model(str(config), str(out))
    assert sparse.backbone.deploy
    assert not any('prior.w' in name for name in sparse.state_dict())
    images = torch.randn(2, 3, 24, 24)
    expected = logits(sparse, images)
    by_name = get_model(str(config), pretrained=str(out)).eval()
    torch.testing.assert_close(logits(by_name, images), expected)
    command('test.py', config, out, '--work-dir', tmp_path / 'w')
    exported = tmp_path / 'sparse.onnx'
    command('deploy/export.py', config, out, exported)
    assert 'top-1 the same' in capsys.readouterr().out

    # A deploy form is measured on its own grid, and refuses another.
    again = (TOOL, config, out, tmp_path / 'again.pth', '--keep-mass', 0.5, '--no-test')
    wrong = 'train_dataloader.dataset.pipeline.0.scale=32'
    line = fails(capsys, *again, *LITTLE, wrong, WIDE_CROP)
    assert 'grid of 8 x 8 patches, but this model was deployed for 6 x 6' in line
    command(*again, *LITTLE)
    _, smaller = load_model(str(tmp_path / 'again.py'), str(tmp_path / 'again.pth'))
    kept, before = (m.backbone.layers[0].attn.kept for m in (smaller, sparse))
    assert kept.sum() < before.sum()

    # Priors and masks, folded later and for another grid, and sparser yet.
    out2, config2 = tmp_path / 'live.pth', tmp_path / 'live.py'
    command(TOOL, CONFIG, trained, out2, '--keep-mass', 0.7, '--no-test', *LITTLE)
    _, live = load_model(str(config2), str(out2))
    torch.testing.assert_close(logits(live, images), expected)
    folded = tmp_path / 'folded.pth'
    command(
        'model_converters/reparameterize_model.py', config2, out2, folded,
        '--grid', 4, 8,
    )  # fmt: skip
    cfg = load_config(str(config2), {'model.backbone.deploy': True})
    again, _ = load_trained_model(cfg, str(folded))
    wide = torch.randn(2, 3, 16, 32)
    assert torch.equal(logits(again, wide), logits(live, wide))
    third = tmp_path / 'third.pth'
    command(TOOL, config2, out2, third, '--keep-mass', 0.5, '--no-test', *LITTLE)
    _, sparser = load_model(str(tmp_path / 'third.py'), str(third))
    for i in range(3):
        kept, before = (m.backbone.layers[i].attn.kept for m in (sparser, live))
        assert kept.sum() < before.sum()
        assert not (kept & ~before).any()

    # A model without masks says that it has none; one with masks keeps all offsets of
    # a checkpoint without.
    line = fails(capsys, 'test.py', CONFIG, out2, '--work-dir', tmp_path / 'w')
    assert (
        'holds masks for the layers [0, 1, 2], and this model has them in none' in line
    )
    unmasked, _ = load_trained_model(load_config(str(config2)), str(trained))
    assert all(layer.attn.kept.all() for layer in unmasked.backbone.layers[:3])


def test_fine_tuned_with_masks(trained, tmp_path, capsys):
    out, work_dir = tmp_path / 'tuned.pth', tmp_path / 'work'
    options = ('--keep-mass', 0.4, '--by', 'window', '--finetune', 2)
    options += ('--work-dir', work_dir)
    command(TOOL, CONFIG, trained, out, *options, *LITTLE)
    printed = capsys.readouterr().out
    assert 'after fine-tuning, epochs: 2' in printed
    assert 'keeps the smallest rectangle of offsets' in printed
    assert not list(work_dir.glob('epoch_*.pth'))
    start = torch.load(work_dir / 'start.pth')['state_dict']
    tuned = torch.load(out)['state_dict']
    for name, value in start.items():
        same = torch.equal(value, tuned[name])
        assert same == name.endswith(('.kept', 'train_grid')), name
    (log,) = work_dir.glob('*/vis_data/config.py')
    cfg = Config.fromfile(str(log))
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2e-4)
    assert cfg.param_scheduler is None
    # The config that is written is that of the training, with masks.
    cfg = Config.fromfile(str(tmp_path / 'tuned.py'))
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2e-3)
    load_model(str(tmp_path / 'tuned.py'), str(out))
    # Nothing of an earlier training is lost.
    again = (TOOL, CONFIG, trained, tmp_path / 'other.pth', '--finetune', 1)
    line = fails(capsys, *again, '--work-dir', work_dir)
    assert f'{work_dir}, is not empty. Give another with --work-dir' in line
    config = work_dir / CONFIG.name
    again = (TOOL, config, trained, f'{work_dir}.pth', '--finetune', 1, '--force')
    assert f'{config} would replace what it is made of' in fails(capsys, *again)


def test_pictures_of_ones_own(trained, tmp_path, capsys):
    folder = tmp_path / 'pictures' / 'inside'
    folder.mkdir(parents=True)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)
        mmcv.imwrite(noise, str(folder / f'{i}.png'))
    out = tmp_path / 'sparse.pth'
    options = ('--data', folder.parent, '--no-test', '--cfg-options')
    # No training data is needed then.
    command(TOOL, CONFIG, trained, out, *options, 'train_dataloader=None')
    assert 'Grid of 6 x 6' in capsys.readouterr().out
    empty = tmp_path / 'empty'
    empty.mkdir()
    new = tmp_path / 'b.pth'
    line = fails(capsys, TOOL, CONFIG, trained, new, '--data', empty, '--no-test')
    assert 'holds no picture' in line


def test_mistakes_are_named_before_the_work(trained, tmp_path, capsys, monkeypatch):
    def no_work(*_):
        raise AssertionError('the attention was measured')

    monkeypatch.setattr('spvit_mm.explain.offset_mass', no_work)
    out = tmp_path / 'a.pth'
    common = (TOOL, CONFIG, trained, out)
    for share in (0, 1.5, -1):
        line = fails(capsys, *common, '--keep-mass', share)
        assert 'takes numbers above 0 up to 1' in line
    assert 'takes whole numbers' in fails(capsys, *common, '--finetune', -1)
    assert 'must end in .pth' in fails(capsys, *common[:3], tmp_path / 'a.txt')
    (tmp_path / 'a.py').write_text('precious')
    assert 'a.py exists' in fails(capsys, *common)
    config = tmp_path / 'mine.py'
    config.write_text(Config.fromfile(str(CONFIG)).pretty_text)
    mine = (TOOL, config, trained, tmp_path / 'mine.pth', '--force')
    assert 'would replace what it is made of' in fails(capsys, *mine)
    new = (*common[:3], tmp_path / 'b.pth', '--cfg-options')
    assert 'lacks train_dataloader' in fails(capsys, *new, 'train_dataloader=None')
    lr = ('--finetune', 1, '--cfg-options', 'optim_wrapper=None')
    assert 'lacks optim_wrapper' in fails(capsys, *new[:4], *lr)

    # Checkpoints without priors, or with others.
    for changes, words in (
        (dict(num_spsa_layers=0), 'has no spatial prior: no SP-SA layer'),
        (dict(attn_cfg=dict(type='RotaryPositionAttention')), 'RotaryPosition'),
    ):
        cfg = load_config(str(CONFIG))
        for name in ('prior', 'attn_cfg'):
            cfg.model.backbone.pop(name)
        cfg.model.backbone.update(changes)
        other, weights = tmp_path / 'other.py', tmp_path / 'other.pth'
        cfg.dump(str(other))
        torch.save(build_model(load_config(str(other))).state_dict(), weights)
        assert words in fails(capsys, TOOL, other, weights, tmp_path / 'c.pth')
    assert not list(tmp_path.glob('[abc].pth'))
    assert (tmp_path / 'a.py').read_text() == 'precious'


def test_attention_that_the_config_does_not_reach(trained, tmp_path, capsys):
    cfg = load_config(str(CONFIG))
    attn = dict(type='SpatialPriorAttention', init_score=2.0)
    attn['prior'] = cfg.model.backbone.prior
    cfg.model.backbone.layer_cfgs = [dict(attn_cfg=attn), {}, {}, {}]
    other = tmp_path / 'other.py'
    cfg.dump(str(other))
    line = fails(capsys, TOOL, other, trained, tmp_path / 'c.pth')
    assert '(backbone.layers.0.attn): is there another in `layer_cfgs`?' in line


def test_pictures_are_read_one_by_one(monkeypatch, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.png').touch()
    read = []

    def read_samples(cfg, model, paths):
        for path in paths:
            read.append(path)
            yield SimpleNamespace(inputs=torch.zeros(3, 8, 8))

    monkeypatch.setattr(api, 'read_samples', read_samples)
    images = api.picture_images(None, None, [str(tmp_path)])
    assert read == []
    assert next(images).shape == (1, 3, 8, 8)
    assert read == [str(tmp_path / '0.png')]


def test_a_bad_picture_is_blamed_for_itself(trained, tmp_path, capsys):
    common = (TOOL, CONFIG, trained, tmp_path / 'a.pth', '--data')
    line = fails(capsys, *common, tmp_path / 'typo.png')
    assert 'the picture' in line
    assert 'typo.png does not exist' in line
    (tmp_path / 'empty.png').touch()
    line = fails(capsys, *common, tmp_path / 'empty.png')
    assert 'empty.png cannot be read: it is empty' in line
    assert 'measured' not in line
