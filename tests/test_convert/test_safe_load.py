import argparse
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from spvit_mm.convert import (
    CheckpointError,
    UnsafeCheckpointError,
    load_checkpoint_safely,
)


def rich_content():
    """What files of timm and mmengine hold beside their weights."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return dict(
        state_dict=model.state_dict(),
        parameter=torch.nn.Parameter(torch.arange(3.0)),
        half=torch.ones(2, dtype=torch.float16),
        dtype=torch.float32,
        size=torch.Size([2, 3]),
        optimizer=optimizer.state_dict(),
        epoch=7,
        arch='spvit_s',
        args=argparse.Namespace(lr=1e-3, local_up_to_layer=14, name='x', none=None),
        metric=np.float64(83.9),
        more=np.array([1, 2, 3]),
        flag=np.bool_(True),
        message_hub=dict(log_scalars=OrderedDict(loss=history)),
    )


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('protocol', [2, 4])
def test_reads_what_checkpoints_hold(tmp_path, new_format, protocol):
    content = rich_content()
    path = tmp_path / 'a.pth'
    torch.save(
        content,
        path,
        _use_new_zipfile_serialization=new_format,
        pickle_protocol=protocol,
    )
    got = load_checkpoint_safely(path)
    assert list(got) == list(content)
    assert list(got['state_dict']) == list(content['state_dict'])
    for key, value in content['state_dict'].items():
        assert torch.equal(got['state_dict'][key], value)
    assert torch.equal(got['parameter'], content['parameter'])
    assert got['half'].dtype == torch.float16
    assert got['dtype'] is torch.float32
    moment = got['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moment, content['optimizer']['state'][0]['exp_avg'])
    assert (got['epoch'], got['arch']) == (7, 'spvit_s')
    assert got['args'].get('local_up_to_layer') == 14
    assert got['args'].get('absent', 5) == 5
    assert not isinstance(got['args'], argparse.Namespace)


class Reduces:
    """Pickles as the call of a function."""

    def __init__(self, func, *args):
        self.call = func, args

    def __reduce__(self):
        return self.call


def evil_objects(marker):
    command = f'touch {marker}'
    return {
        'os.system': Reduces(os.system, command),
        'subprocess': Reduces(subprocess.check_call, ['touch', str(marker)]),
        'eval': Reduces(eval, f'open({str(marker)!r}, "w")'),
        # modules cannot be pickled, but attributes of classes lead to them
        'getattr': Reduces(getattr, argparse.Namespace, '__init__'),
        'open': Reduces(open, str(marker), 'w'),
        'torch.load': Reduces(torch.load, str(marker)),
        'torch.save': Reduces(torch.save, 1, str(marker)),
        'class': Reduces(argparse.ArgumentParser, command),
        'partial': Reduces(__import__('functools').partial, os.system, command),
    }


@pytest.mark.parametrize('kind', evil_objects(''))
@pytest.mark.parametrize('form', ['zip', 'legacy', 'bare'])
def test_refuses_what_would_run(tmp_path, monkeypatch, kind, form):
    marker = tmp_path / 'ran'
    evil = evil_objects(marker)[kind]
    path = tmp_path / 'a.pth'
    content = dict(state_dict=dict(a=torch.ones(1)), evil=evil)
    if form == 'bare':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')

    calls = []
    load = torch.load
    monkeypatch.setattr(torch, 'load', lambda *a, **k: calls.append(k) or load(*a, **k))
    with pytest.raises(UnsafeCheckpointError, match='could run code') as error:
        load_checkpoint_safely(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    assert len(calls) == (0 if form == 'bare' else 1)
    assert all(k['pickle_module'].__name__ == 'restricted_pickle' for k in calls)


def zip_with_pickle(path, data):
    """A zip checkpoint whose pickle is ``data``."""
    torch.save(dict(a=torch.ones(1)), path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, old in files.items():
            archive.writestr(name, data if name.endswith('data.pkl') else old)


def short(text):
    return b'\x8c' + bytes([len(text)]) + text


@pytest.mark.parametrize(
    'data',
    [
        # a dotted name that leads from an allowed module to another
        b'\x80\x04' + short(b'torch._utils') + short(b'torch.os.system') + b'\x93.',
        # INST and OBJ, which call without REDUCE
        b"\x80\x02(S'x'\nicollections\nOrderedDict\n.",
        b'\x80\x02(ccollections\nOrderedDict\no.',
        # BUILD on a class: it would set an attribute of it
        b'\x80\x02ccollections\nOrderedDict\n}b.',
        b"\x80\x02cargparse\nNamespace\nN}S'__init__'\nK\x01s\x86b.",
        # the result of an allowed call, called in turn
        b"\x80\x02c__builtin__\ngetattr\nctorch\nSize\nS'count'\n\x86R.",
        # an extension code
        b'\x80\x02\x82\x01.',
        # bytes encoded by something else than latin1
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aS'rot13'\n\x86R.",
    ],
)
def test_refuses_crafted_pickles(tmp_path, data):
    path = tmp_path / 'a.pth'
    zip_with_pickle(path, data)
    with pytest.raises(UnsafeCheckpointError, match='is refused'):
        load_checkpoint_safely(path)


def test_a_refused_file_changes_no_class(tmp_path):
    path = tmp_path / 'a.pth'
    before = dict(vars(OrderedDict))
    zip_with_pickle(path, b"\x80\x02ccollections\nOrderedDict\nN}S'evil'\nK\x01s\x86b.")
    with pytest.raises(UnsafeCheckpointError):
        load_checkpoint_safely(path)
    assert dict(vars(OrderedDict)) == before


def saved_bytes(tmp_path, **kwargs):
    path = tmp_path / 'whole.pth'
    torch.save(dict(state_dict=dict(a=torch.rand(100, 100))), path, **kwargs)
    return path.read_bytes()


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', r'is empty \(0 bytes\)'),
        (b'<!DOCTYPE html><html><body>404</body></html>', 'a web page'),
        (b'\n  <HTML><title>Sign in</title>', 'a web page'),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error/>', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'Git LFS'),
        ((80).to_bytes(8, 'little') + b'{"a":1}' + b' ' * 99, 'safetensors'),
        (b'\x1f\x8b\x08' + b'0' * 100, 'compressed'),
        (b'some text\n', 'no file of torch.save'),
        (b'PK\x03\x04' + b'0' * 100, 'damaged or was only partly downloaded'),
        (b'x' * 257 + b'ustar' + b'\0' * 300, 'tar archive'),
    ],
)
def test_names_what_is_no_checkpoint(tmp_path, content, words):
    path = tmp_path / 'model.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        load_checkpoint_safely(path)
    assert str(path) in str(error.value)


def test_names_missing_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match='does not exist'):
        load_checkpoint_safely(tmp_path / 'none.pth')
    (tmp_path / 'epoch_3.pth').write_bytes(b'x')
    with pytest.raises(CheckpointError, match=r'is a directory.*epoch_3\.pth'):
        load_checkpoint_safely(tmp_path)


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('part', [0.3, 0.95])
def test_truncated_file(tmp_path, new_format, part):
    whole = saved_bytes(tmp_path, _use_new_zipfile_serialization=new_format)
    path = tmp_path / 'part.pth'
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match='only partly downloaded'):
        load_checkpoint_safely(path)


def test_other_zip_and_torchscript(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='not one of torch.save'):
        load_checkpoint_safely(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UnsafeCheckpointError, match='TorchScript'):
        load_checkpoint_safely(path)
