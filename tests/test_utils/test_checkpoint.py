import argparse
import importlib
import os
import pickle
import re
import subprocess
import tarfile
import threading
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint
from mmengine.utils import digit_version, import_modules_from_strings
from mmpretrain.apis import ImageClassificationInferencer, get_model
from mmpretrain.registry import MODELS

from spvit_mm.apis import load_model, load_trained_model
from spvit_mm.datasets.token_labels import read_label_map
from spvit_mm.utils import (
    CheckpointError,
    UnsafeCheckpointError,
    UserError,
    checkpoint,
    read_checkpoint,
    safe_loader,
    write_checkpoint,
)
from tests.test_engine.tiny import make_data, write_config

needs_allowing = pytest.mark.skipif(
    not checkpoint.CAN_ALLOW,
    reason='refused before PyTorch 2.4: test_a_torch_that_can_allow_nothing',
)


def rich_content():
    """What files of timm and mmengine hold beside their weights."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    history = HistoryBuffer([1.0, 2.0], [1, 1], max_length=9)
    return dict(
        state_dict=model.state_dict(),
        parameter=torch.nn.Parameter(torch.arange(3.0)),
        half=torch.ones(2, dtype=torch.float16),
        dtype=torch.float32,
        size=torch.Size([2, 3]),
        optimizer=optimizer.state_dict(),
        epoch=7,
        arch='spvit_s',
        args=argparse.Namespace(lr=1e-3, size=(1, 2), nested=argparse.Namespace(a=1)),
        metric=np.float64(83.9),
        flag=np.bool_(True),
        counts={np.int64(3): 1},
        arrays=[np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((3, 2)))],
        big_endian=np.arange(3, dtype='>f4'),
        message_hub=dict(log_scalars=OrderedDict(loss=history)),
    )


@needs_allowing
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_reads_what_checkpoints_hold(tmp_path, new_format):
    content = rich_content()
    path = tmp_path / 'a.pth'
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    got = read_checkpoint(path)
    with safe_loader():
        assert list(CheckpointLoader.load_checkpoint(str(path))) == list(content)
    assert list(got) == list(content)
    assert list(got['state_dict']) == list(content['state_dict'])
    for key, value in content['state_dict'].items():
        assert torch.equal(got['state_dict'][key], value)
    assert got['state_dict']._metadata == content['state_dict']._metadata
    assert torch.equal(got['parameter'], content['parameter'])
    assert got['half'].dtype == torch.float16
    assert got['dtype'] is torch.float32
    assert got['size'] == torch.Size([2, 3])
    moment = got['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moment, content['optimizer']['state'][0]['exp_avg'])
    assert (got['epoch'], got['arch']) == (7, 'spvit_s')
    assert got['args'] == content['args']
    assert (got['metric'], type(got['metric'])) == (83.9, np.float64)
    assert got['flag'] == np.True_
    assert [type(key) for key in got['counts']] == [np.int64]
    for name in ('arrays', 'big_endian'):
        for ours, theirs in zip(got[name], content[name], strict=True):
            assert type(ours) is type(theirs)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    history = got['message_hub']['log_scalars']['loss']
    assert type(history) is HistoryBuffer
    assert history.mean() == 1.5
    assert history.max_length == 9
    # It can be continued and saved again.
    history.update(3.0)
    torch.save(got, path)
    assert read_checkpoint(path)['message_hub']['log_scalars']['loss'].current() == 3.0


@needs_allowing
@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_names_of_numpy_1_and_2(tmp_path, module):
    path = tmp_path / 'a.pth'
    torch.save(dict(metric=np.float64(1.5), array=np.arange(2)), path)
    here = np.zeros(1).__reduce__()[0].__module__
    change_pickle(path, lambda data: data.replace(here.encode(), module.encode()))
    got = read_checkpoint(path)
    assert got['metric'] == 1.5
    assert got['array'].tolist() == [0, 1]


def test_sets(tmp_path):
    """torch takes them since 2.6."""
    torch.save(dict(a={np.int64(3)}), tmp_path / 'a.pth')
    if digit_version(torch.__version__) >= digit_version('2.6'):
        (value,) = read_checkpoint(tmp_path / 'a.pth')['a']
        assert (value, type(value)) == (3, np.int64)
    else:
        with pytest.raises(UnsafeCheckpointError, match='set'):
            read_checkpoint(tmp_path / 'a.pth')


# --------------------------------------------------------------------- poisons


class Reduces:
    """Pickles as the call of a function."""

    def __init__(self, func, *args, state=None):
        self.call = (func, args) if state is None else (func, args, state)

    def __reduce__(self):
        return self.call


def poisons(folder):
    """What to save, and what the refusal must name."""
    marker = str(folder / 'ran')
    command = f'touch {marker}'
    (folder / 'ran_when_imported.py').write_text(f'open({marker!r}, "w")')
    byte_pointers = Reduces(np.dtype, 'O8', False, True)
    return {
        'os.system': (Reduces(os.system, command), 'posix.system'),
        'subprocess': (Reduces(subprocess.check_call, ['touch', marker]), 'check_call'),
        'eval': (Reduces(eval, f'open({marker!r}, "w")'), 'eval'),
        'open': (Reduces(open, marker, 'w'), 'io.open'),
        'partial': (Reduces(partial, os.system, command), 'functools.partial'),
        # modules cannot be pickled, but attributes of classes lead to them
        'getattr': (Reduces(getattr, argparse.Namespace, '__init__'), 'getattr'),
        'getattr chain': (
            Reduces(getattr, Reduces(getattr, HistoryBuffer, 'mean'), '__globals__'),
            'getattr',
        ),
        'import': (Reduces(importlib.import_module, 'ran_when_imported'), 'import_mod'),
        'import of mmengine': (
            Reduces(import_modules_from_strings, ['ran_when_imported']),
            'import_modules_from_strings',
        ),
        'torch.load': (Reduces(torch.load, marker), 'torch.serialization.load'),
        'torch.save': (Reduces(torch.save, 1, marker), 'torch.serialization.save'),
        'numpy.load': (Reduces(np.load, marker), 'numpy'),
        'class': (Reduces(argparse.ArgumentParser, command), 'ArgumentParser'),
        'numpy objects': (np.array([{}], dtype=object), 'numpy'),
        # a state that makes numpy take bytes for pointers
        'numpy state': (
            Reduces(
                np.zeros(1).__reduce__()[0],
                np.ndarray,
                (0,),
                b'b',
                state=(1, (1,), byte_pointers, False, b'\x01' * 8),
            ),
            'numpy',
        ),
        'numpy.ndarray': (Reduces(np.ndarray, (10**12,), 'O'), 'numpy.ndarray'),
    }


PLACES = {
    'whole file': lambda evil: evil,
    'meta': lambda evil: dict(meta=dict(seed=evil), state_dict={}),
    'state_dict': lambda evil: dict(state_dict=dict(a=torch.ones(1), b=evil)),
    'optimizer': lambda evil: dict(optimizer=dict(param_groups=[dict(lr=evil)])),
    'message_hub': lambda evil: dict(message_hub=dict(log_scalars=dict(loss=evil))),
    'args': lambda evil: dict(args=argparse.Namespace(lr=evil)),
    'tuple': lambda evil: dict(betas=(0.9, (evil,))),
    'key': lambda evil: {evil: 1},
}


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('form', ['zip', 'legacy', 'bare'])
def test_refuses_what_would_run(tmp_path, monkeypatch, place, form):
    monkeypatch.syspath_prepend(tmp_path)
    for kind, (evil, name) in poisons(tmp_path).items():
        if place == 'key' and kind.startswith('numpy'):
            continue  # what is no call has no hash to be a key
        content = PLACES[place](evil)
        path = tmp_path / f'{kind}.pth'
        if form == 'bare':
            path.write_bytes(pickle.dumps(content, protocol=2))
            name = 'a bare pickle'
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
        if not checkpoint.CAN_ALLOW and place == 'args' and form != 'bare':
            name = 'PyTorch 2.4'  # for the Namespace, which comes first
        with pytest.raises(CheckpointError, match=name) as error:
            read_checkpoint(path)
        assert isinstance(error.value, UnsafeCheckpointError) == (form != 'bare')
        assert str(path) in str(error.value)
        assert not (tmp_path / 'ran').exists(), kind


def test_each_poison_is_one(tmp_path, monkeypatch):
    """Trust runs what the test above refuses."""
    monkeypatch.syspath_prepend(tmp_path)
    ran = tmp_path / 'ran'
    torch.save(dict(a=torch.ones(1)), tmp_path / 'a.pth')
    for kind in ('os.system', 'subprocess', 'eval', 'open', 'import', 'torch.save'):
        evil, _ = poisons(tmp_path)[kind]
        torch.save(evil, tmp_path / 'a.pth')
        read_checkpoint(tmp_path / 'a.pth', trust=True)
        assert ran.exists(), kind
        ran.unlink()


def change_pickle(path, change):
    """Replace the pickle of a zip checkpoint."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, old in files.items():
            archive.writestr(name, change(old) if name.endswith('data.pkl') else old)


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value


NAMESPACE = b'cargparse\nNamespace\n'
HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
GETATTR = b'c__builtin__\ngetattr\n'
CRAFTED = {
    'dotted name': b'\x80\x02ctorch._utils\ntorch.os.system\n.',
    'STACK_GLOBAL': b'\x80\x04\x8c\x05posix\x8c\x06system\x93.',
    'INST': b"\x80\x02(S'x'\nicollections\nOrderedDict\n.",
    'OBJ': b'\x80\x02(ccollections\nOrderedDict\no.',
    'EXT1': b'\x80\x02\x82\x01.',
    # BUILD on a class: it would set an attribute of it
    'BUILD of OrderedDict': b'\x80\x02ccollections\nOrderedDict\n}'
    + text(b'evil')
    + b'K\x01sb.',
    'BUILD of HistoryBuffer': b'\x80\x02' + HISTORY + b'}' + text(b'x') + b'K\x01sb.',
    # the result of an allowed call, called in turn
    'called result': b'\x80\x02' + GETATTR + HISTORY + text(b'mean') + b'\x86R)R.',
    'a bare name': b'\x80\x02' + HISTORY + b'.',
    'only getattr': b'\x80\x02' + GETATTR + b'.',
    'item of a Namespace': b'\x80\x02' + NAMESPACE + b')\x81K\x01K\x02s.',
}


@pytest.mark.parametrize('kind', CRAFTED)
def test_refuses_crafted_pickles(tmp_path, kind):
    path = tmp_path / 'a.pth'
    torch.save(dict(a=torch.ones(1)), path)
    change_pickle(path, lambda old: CRAFTED[kind])
    before = dict(vars(OrderedDict)), dict(vars(HistoryBuffer))
    # Of the last kind torch's own TypeError says that it is garbage.
    with pytest.raises(CheckpointError, match='is refused|is damaged'):
        read_checkpoint(path)
    assert (dict(vars(OrderedDict)), dict(vars(HistoryBuffer))) == before


@needs_allowing
def test_statistics_of_a_file_are_not_taken(tmp_path, monkeypatch):
    """A HistoryBuffer names its statistics, by which they could be exchanged."""
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    history = HistoryBuffer([1.0], [1])
    good = dict(HistoryBuffer._statistics_methods)
    HistoryBuffer._statistics_methods.update(mean=HistoryBuffer.max)
    torch.save(history, tmp_path / 'a.pth')
    HistoryBuffer._statistics_methods.update(good)
    assert read_checkpoint(tmp_path / 'a.pth').statistics('mean') == 1.0
    assert HistoryBuffer._statistics_methods == good


@needs_allowing
def test_what_others_allow_is_not_allowed_here(tmp_path):
    torch.save(Reduces(eval, '[1]'), tmp_path / 'a.pth')
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([eval])
    try:
        assert torch.load(tmp_path / 'a.pth', weights_only=True) == [1]
        with pytest.raises(UnsafeCheckpointError, match='eval'):
            read_checkpoint(tmp_path / 'a.pth')
        after = torch.serialization.get_safe_globals()
        assert set(after) == {*before, eval}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@needs_allowing
def test_threads(tmp_path):
    torch.save(rich_content(), tmp_path / 'a.pth')
    before = set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read_checkpoint, [tmp_path / 'a.pth'] * 32))
    assert all(result['args'].lr == 1e-3 for result in results)
    assert set(torch.serialization.get_safe_globals()) == before


def test_plain(tmp_path):
    torch.save(dict(a=torch.ones(1)), tmp_path / 'plain.pth')
    torch.save(dict(args=argparse.Namespace()), tmp_path / 'rich.pth')
    assert read_checkpoint(tmp_path / 'plain.pth', plain=True)['a'] == 1
    with pytest.raises(
        UnsafeCheckpointError, match=r'argparse.Namespace`.*nothing was\.$'
    ):
        read_checkpoint(tmp_path / 'rich.pth', plain=True)


def test_a_torch_that_can_allow_nothing(tmp_path, monkeypatch):
    """Before 2.4: plain files load, others are refused with the version that can."""
    monkeypatch.setattr(checkpoint, 'CAN_ALLOW', False)
    torch.save(dict(a=torch.ones(1)), tmp_path / 'plain.pth')
    assert read_checkpoint(tmp_path / 'plain.pth')['a'] == 1
    for value, name in (
        (argparse.Namespace(a=1), 'argparse.Namespace'),
        (HistoryBuffer([1.0], [1]), 'HistoryBuffer'),
    ):
        torch.save(dict(a=torch.ones(1), more=value), tmp_path / 'rich.pth')
        with pytest.raises(UnsafeCheckpointError, match=rf'{name}.*PyTorch 2\.4 or'):
            read_checkpoint(tmp_path / 'rich.pth')
    torch.save(Reduces(eval, '1'), tmp_path / 'evil.pth')
    with pytest.raises(UnsafeCheckpointError, match='That could run code'):
        read_checkpoint(tmp_path / 'evil.pth')


# ------------------------------------------------------------- no checkpoint


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', r'is empty \(0 bytes\)'),
        (b'<!DOCTYPE html><html><body>404</body></html>', 'a web page'),
        (b'\n  <HTML><title>Sign in</title>', 'a web page'),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error/>', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'Git LFS'),
        ((80).to_bytes(8, 'little') + b'{"a":1}' + b' ' * 99, 'SafetensorError'),
        (b'some text\n', 'no file of torch.save'),
        (b'PK\x03\x04' + b'0' * 100, 'damaged or was only partly downloaded'),
    ],
)
def test_names_what_is_no_checkpoint(tmp_path, content, words):
    path = tmp_path / 'model.pth'
    path.write_bytes(content)
    for kwargs in (dict(), dict(plain=True), dict(trust=True)):
        with pytest.raises(CheckpointError, match=words) as error:
            read_checkpoint(path, **kwargs)
        assert str(path) in str(error.value)


def test_names_missing_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match='does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='is a directory'):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_tar(tmp_path, format):
    path = tmp_path / 'a.pth'
    with tarfile.open(path, 'w', format=format) as archive:
        archive.add(__file__, 'storages')
    with pytest.raises(CheckpointError, match='a tar archive'):
        read_checkpoint(path)


def test_tar_behind_a_torch_magic(tmp_path):
    """A file that is a legacy checkpoint and a tar archive is the latter to torch."""
    path = tmp_path / 'a.pth'
    torch.save(dict(a=torch.ones(1)), path, _use_new_zipfile_serialization=False)
    name = path.read_bytes()[:64]
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
        archive.add(__file__, 'x' * 64)
    block = bytearray(path.read_bytes())
    # The oldest tar has no magic of its own, but a checksum.
    block[:64], block[257:265] = name, bytes(8)
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block[:512])
    path.write_bytes(block)
    with pytest.raises(CheckpointError, match='a tar archive'):
        read_checkpoint(path)


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('part', [0.3, 0.95])
def test_truncated_file(tmp_path, new_format, part):
    path = tmp_path / 'a.pth'
    content = dict(state_dict=dict(a=torch.rand(100, 100)))
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match='only partly downloaded'):
        read_checkpoint(path)


def test_other_zip_and_torchscript(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='not one of torch.save'):
        read_checkpoint(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(path)


# ------------------------------------------------------------------- mmengine


HOOKS = ('AtomicCheckpointHook', pytest.param('CheckpointHook', marks=needs_allowing))


@pytest.fixture
def trained(tmp_path, request):
    """A config, and a checkpoint that a hook wrote while it was trained."""
    config = write_config(tmp_path / 'c.py', make_data(tmp_path / 'data'), length=2)
    hook = getattr(request, 'param', HOOKS[0])
    runner = runner_of(config, 'first', **{'default_hooks.checkpoint.type': hook})
    runner.train()
    return config, tmp_path / 'first' / 'epoch_1.pth', runner.model.state_dict()


def runner_of(config, name, **options):
    cfg = Config.fromfile(config)
    cfg.work_dir = str(config.parent / name)
    cfg.experiment_name = f'{config.parent.name}_{name}'
    cfg.merge_from_dict(options)
    return Runner.from_cfg(cfg)


def poison(path):
    """Put a poison into the message hub of a checkpoint; returns its marker."""
    content = torch.load(path, weights_only=False)
    marker = path.parent / 'ran'
    evil = Reduces(os.system, f'touch {marker}')
    content['message_hub']['runtime_info']['evil'] = evil
    torch.save(content, path)
    return marker


@needs_allowing
@pytest.mark.parametrize('trained', ['CheckpointHook'], indirect=True)
def test_reads_a_checkpoint_of_mmengine(trained):
    _, path, _ = trained
    want = torch.load(path, weights_only=False)
    got = read_checkpoint(path)
    assert list(got) == list(want)
    assert got['meta'] == want['meta']
    for key, value in want['state_dict'].items():
        assert torch.equal(got['state_dict'][key], value)
    ours, theirs = (c['message_hub']['log_scalars'] for c in (got, want))
    assert list(ours) == list(theirs)
    assert len(theirs) > 1
    for key, history in theirs.items():
        assert type(ours[key]) is HistoryBuffer
        for a, b in zip(ours[key].data, history.data, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('trained', HOOKS, indirect=True)
def test_a_run_resumes_by_the_safe_loader(trained):
    config, path, want = trained
    options = dict(resume=True, load_from=str(path))
    with safe_loader():
        runner = runner_of(config, 'second', **options)
        model = runner.train()
    for key, value in model.state_dict().items():
        assert torch.equal(value, want[key]), key
    # Its log goes on where that of the file ended.
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    assert len(losses) == 6  # 3 of each epoch


def load_init_cfg(path):
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone')
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    MODELS.build(
        dict(
            type='VisionTransformer',
            arch=arch,
            img_size=16,
            patch_size=8,
            init_cfg=init_cfg,
        )
    ).init_weights()


def spvit(**kwargs):
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    cfg = dict(type='SPViT', arch=arch, img_size=16, patch_size=8, **kwargs)
    return dict(cfg, _scope_='mmpretrain')


def our_apis(path, folder):
    """What of ours opens a file, from plain Python: the backbone, a classifier, a load."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    head = dict(
        type='TokenLabelClsHead', num_classes=3, in_channels=16, _scope_='mmpretrain'
    )
    classifier = dict(
        type='mmpretrain.TokenLabelClassifier',
        backbone=spvit(out_type='raw'),
        head=head,
    )
    config = folder / 'ours.py'
    config.write_text(f"default_scope = 'mmpretrain'\nmodel = {classifier}")
    return {
        'backbone': lambda: MODELS.build(
            spvit(init_cfg=dict(init_cfg, prefix='backbone'))
        ).init_weights(),
        'inside': lambda: torch.nn.Sequential(MODELS.build(spvit(init_cfg=init_cfg)))[
            0
        ].init_weights(),
        'classifier': lambda: MODELS.build(
            dict(classifier, init_cfg=init_cfg)
        ).init_weights(),
        'pretrained': lambda: MODELS.build(
            dict(classifier, pretrained=str(path))
        ).init_weights(),
        'load_model': lambda: load_model(str(config), str(path)),
        'load_trained_model': lambda: load_trained_model(
            Config.fromfile(config), str(path)
        ),
        'read_label_map': lambda: read_label_map(path, 3),
    }


def test_our_python_refuses_poison(tmp_path):
    """Without any ``safe_loader`` around it."""
    path, marker = tmp_path / 'a.pth', tmp_path / 'ran'
    state = {f'backbone.{k}': v for k, v in MODELS.build(spvit()).state_dict().items()}
    evil = Reduces(os.system, f'touch {marker}')
    for form in (True, False):
        torch.save(
            dict(state_dict=state, meta=evil),
            path,
            _use_new_zipfile_serialization=form,
        )
        for name, way in our_apis(path, tmp_path).items():
            with pytest.raises(UserError, match=r'posix\.system'):
                way()
            assert not marker.exists(), name
    # Who trusts a file says so around it.
    with safe_loader(trust=True):
        our_apis(path, tmp_path)['backbone']()
    assert marker.exists()


def test_the_ways_of_mmpretrain_are_safe_inside(tmp_path):
    """As docs/checkpoints.md says to write them."""
    path, marker = tmp_path / 'a.pth', tmp_path / 'ran'
    torch.save(dict(meta=Reduces(os.system, f'touch {marker}')), path)
    name = 'sp-deit-tiny_4xb256_in1k'
    ways = {
        'get_model': lambda: get_model(name, pretrained=str(path)),
        'inferencer': lambda: ImageClassificationInferencer(name, pretrained=str(path)),
    }
    for way in ways.values():
        with pytest.raises(UnsafeCheckpointError), safe_loader():
            way()
        assert not marker.exists()
    with pytest.raises(UnsafeCheckpointError), safe_loader():
        _load_checkpoint(str(path))


@needs_allowing
def test_a_config_in_a_file_is_not_run(trained, tmp_path):
    """mmengine runs ``meta['config']`` when it resumes, as text of Python."""
    config, path, _ = trained
    marker = tmp_path / 'ran'
    content = torch.load(path, weights_only=False)
    content['meta']['config'] = f'open({str(marker)!r}, "w")'
    torch.save(content, path)
    for name, trust in (('safe', False), ('trusting', True)):
        with safe_loader(trust):
            runner_of(config, name, load_from=str(path), resume=True).train()
        assert marker.exists() == trust


def test_the_safe_loader_opens_what_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    folder, marker = tmp_path / 'www', tmp_path / 'ran'
    folder.mkdir()
    torch.save(dict(a=torch.ones(1)), folder / 'good.pth')
    torch.save(dict(a=torch.ones(1)), folder / 'good-0123abcd.pth')
    (folder / 'other').mkdir()
    torch.save(dict(a=torch.zeros(1)), folder / 'other' / 'good.pth')
    torch.save(dict(a=Reduces(os.system, f'touch {marker}')), folder / 'evil.pth')
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *args: None)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        with safe_loader():
            content = CheckpointLoader.load_checkpoint(f'{address}/good.pth')
            assert content['state_dict']['a'] == 1
            # Another address that ends alike is another file.
            content = CheckpointLoader.load_checkpoint(f'{address}/other/good.pth')
            assert content['state_dict']['a'] == 0
            # A process on another machine finds nothing of what the first one fetched.
            monkeypatch.setattr('mmengine.dist.is_main_process', lambda: False)
            CheckpointLoader.load_checkpoint(f'{address}/good-0123abcd.pth')
            with pytest.raises(UnsafeCheckpointError, match='posix'):
                CheckpointLoader.load_checkpoint(f'{address}/evil.pth')
            with pytest.raises(CheckpointError, match='none.pth` cannot be downloaded'):
                CheckpointLoader.load_checkpoint(f'{address}/none.pth')
        server.shutdown()
    assert not marker.exists()
    names = [path.name for path in (tmp_path / 'hub' / 'checkpoints').iterdir()]
    assert 'good-0123abcd.pth' in names
    assert sum(re.fullmatch('good-[0-9a-f]{8}.pth', x) is not None for x in names) == 3


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (torch.ones(2), 'it is a Tensor'),
        ([torch.ones(2)], 'it is a list'),
        ('text', 'it is a str'),
        (0.5, 'it is a float'),
        (dict(state_dict=[torch.ones(2)]), '`state_dict` is a list'),
        (dict(state_dict=dict(a=0.5)), "as 'a', a float"),
        (dict(state_dict={1: torch.ones(1)}), 'as 1, a Tensor'),
        (dict(state_dict={}), '`state_dict` is empty'),
        ({}, 'it is empty'),
        (dict(model=dict(a=torch.ones(1))), "as 'model', a dict.*convert.py"),
    ],
)
def test_the_safe_loader_says_what_holds_no_weights(tmp_path, content, words):
    path = tmp_path / 'a.pth'
    torch.save(content, path)
    for trust in (False, True):
        with (
            safe_loader(trust),
            pytest.raises(CheckpointError, match=words) as error,
        ):
            CheckpointLoader.load_checkpoint(str(path))
        assert str(path) in str(error.value)


def test_extra_state_is_no_weight(tmp_path):
    torch.save(
        dict(state_dict={'a': torch.ones(1), 'b._extra_state': 3}), tmp_path / 'a'
    )
    with safe_loader():
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a'))


# ---------------------------------------------------------------- safetensors


def test_safetensors(tmp_path):
    one = torch.arange(6.0).reshape(2, 3)
    state = dict(a=one.t(), b=one, half=one.half(), grid=torch.tensor([2, 3]))
    path = tmp_path / 'a.safetensors'
    write_checkpoint(dict(state_dict=state, meta=dict(grid=(2, 3))), path)
    with safe_loader():
        loaded = CheckpointLoader.load_checkpoint(str(path))['state_dict']
    for got in (read_checkpoint(path), read_checkpoint(path, trust=True), loaded):
        assert sorted(got) == sorted(state)
        for key, value in state.items():
            assert got[key].dtype == value.dtype
            assert torch.equal(got[key], value)
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata() == dict(grid='(2, 3)', format='pt')
    # By what it is, whatever its name; also where its length starts as a pickle does.
    for length in (0x80, 0x180):
        renamed = tmp_path / 'b.pth'
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        header += b' ' * (length - len(header))
        data = length.to_bytes(8, 'little') + header + b'\0\0\x80?'
        renamed.write_bytes(data)
        assert read_checkpoint(renamed)['a'] == 1
        renamed.write_bytes(data[:-2])
        with pytest.raises(CheckpointError, match='only partly downloaded'):
            read_checkpoint(renamed)


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    write_checkpoint(dict(state_dict=dict(a=torch.ones(1))), path)
    monkeypatch.setattr(checkpoint, 'safetensors', None)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        write_checkpoint(dict(state_dict={}), tmp_path / 'b.safetensors')
    assert not (tmp_path / 'b.safetensors').exists()


def test_spvit_starts_from_safetensors(tmp_path):
    """Plain Python too, where mmengine's own loader would not know the file."""
    path = tmp_path / 'model.safetensors'
    state = {
        f'backbone.{k}': torch.full_like(v, 2)
        for k, v in MODELS.build(spvit()).state_dict().items()
    }
    write_checkpoint(dict(state_dict=state), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone')
    model = MODELS.build(spvit(init_cfg=init_cfg))
    model.init_weights()
    assert all((param == 2).all() for param in model.parameters())


def test_the_safe_loader_refuses_poison(trained):
    config, path, _ = trained
    marker = poison(path)
    ways = {
        'load_checkpoint': lambda: load_checkpoint(torch.nn.Linear(1, 1), str(path)),
        'init_cfg': lambda: load_init_cfg(path),
        'load_from': lambda: runner_of(config, 'a', load_from=str(path)).train(),
        'resume': lambda: runner_of(
            config, 'b', load_from=str(path), resume=True
        ).train(),
    }
    for name, way in ways.items():
        with (
            pytest.raises(UnsafeCheckpointError, match=r'posix\.system'),
            safe_loader(),
        ):
            way()
        assert not marker.exists(), name
    # They all can: mmengine alone, and trust, run it.
    for trust in (False, True):
        with safe_loader(trust) if trust else nullcontext():
            load_init_cfg(path)
        assert marker.exists()
        marker.unlink()


def test_the_loader_of_before_comes_back(tmp_path):
    def local():
        return CheckpointLoader._get_checkpoint_loader('a.pth')

    before = local()
    mmengine_web = CheckpointLoader._get_checkpoint_loader('https://x/y.pth')
    with safe_loader():
        ours = local()
        assert ours is not before
        with (
            pytest.raises(CheckpointError, match='does not exist'),
            safe_loader(trust=True),
        ):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'none.pth'))
        assert local() is ours
        web = CheckpointLoader._get_checkpoint_loader('https://x/y.pth')
        assert web.__name__ == 'load_from_http'
        assert web is not mmengine_web
    assert local() is before
    assert CheckpointLoader._get_checkpoint_loader('https://x/y.pth') is mmengine_web
