"""Hooks of ours are in a config once, however it names them."""

import pytest
from mmengine.config import Config, ConfigDict

from spvit_mm.apis.runner import add_hook
from spvit_mm.apis.train import _set_precision
from spvit_mm.engine.hooks import DataCheckHook, LoadReportHook
from tests.test_engine.tiny import make_data, write_config
from tests.test_tools.test_train_test import command


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg'])
@pytest.mark.parametrize(
    'kind',
    [
        DataCheckHook,
        'mmpretrain.DataCheckHook',
        'mmpretrain.SegDataCheckHook',
    ],
)
def test_a_hook_that_is_there_is_not_added(kind, scope):
    if scope == 'mmseg':
        pytest.importorskip('mmseg')
    for place in (
        dict(custom_hooks=[dict(type='EMAHook'), dict(type=kind)]),
        dict(default_hooks=dict(check=dict(type=kind), timer=None)),
    ):
        cfg = Config(dict(default_scope=scope, **place))
        add_hook(cfg, DataCheckHook, corrupt_images='skip')
        hooks = [*cfg.get('custom_hooks', []), *cfg.get('default_hooks', {}).values()]
        assert len(hooks) == 2
        ours = [hook for hook in hooks if hook and hook.type == kind]
        assert [hook.corrupt_images for hook in ours] == ['skip']


def test_a_hook_that_is_not_there_is_added(mmpretrain_scope):
    cfg = Config(dict(default_scope='mmpretrain', custom_hooks=None))
    add_hook(cfg, LoadReportHook, partial='error')
    add_hook(cfg, DataCheckHook)
    assert cfg.custom_hooks == [
        dict(type='mmpretrain.LoadReportHook', partial='error'),
        dict(type='mmpretrain.DataCheckHook'),
    ]


def test_a_hook_given_as_a_class_runs_once(tmp_path, capsys):
    config = write_config(tmp_path / 'c.py', make_data(tmp_path), length=1)
    # As mmengine's own tools do it: a config that imports what it names.
    with open(config, 'a') as file:
        file.write(
            '\nfrom spvit_mm.engine.hooks import DataCheckHook\n'
            'custom_hooks = [dict(type=DataCheckHook)]\n'
        )
    command('train.py', config, '--work-dir', tmp_path / 'w')
    stage = capsys.readouterr().out.split('before_run:')[1].split('-----')[0]
    assert stage.count('DataCheckHook') == 1


@pytest.mark.parametrize('kind', ['OptimWrapper', 'mmengine.OptimWrapper'])
def test_precision_of_wrappers_by_name(kind):
    wrapper = ConfigDict(type=kind)
    _set_precision(wrapper, amp=True)
    assert wrapper.type in ('AmpOptimWrapper', 'mmpretrain.BFloat16OptimWrapper')
