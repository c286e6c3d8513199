"""Hooks of ours are in a config once, however it names them."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config, ConfigDict

from spvit_mm.apis.runner import add_hook, merge_common_args
from spvit_mm.apis.schedule import shorten_schedulers
from spvit_mm.apis.train import _shorten_schedule, set_precision
from spvit_mm.engine.hooks import DataCheckHook, LoadReportHook
from tests.test_engine.tiny import make_data, write_config
from tests.test_tools.test_train_test import command, fails


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
    set_precision(wrapper, amp=True)
    assert wrapper.type in ('AmpOptimWrapper', 'mmpretrain.BFloat16OptimWrapper')


def test_a_shorter_training_shortens_its_schedule(tmp_path, capsys):
    """The one that is asked for on the command line; a config's own stays an error."""
    data = make_data(tmp_path)
    more = """
__type = dict(type='LinearLR', start_factor=0.1)
param_scheduler = [
    dict(__type, end=3),
    dict(type='CosineAnnealingLR', begin=3, convert_to_iter_based=True),
    dict(__type, by_epoch=False, begin=1, end=7)]
"""
    config = write_config(tmp_path / 'c.py', data, length=9, more=more)
    work = ('--work-dir', tmp_path / 'w', '--no-validate')
    command('train.py', config, *work, '--cfg-options', 'train_cfg.max_epochs=1')
    (line,) = [x for x in capsys.readouterr().out.splitlines() if 'Left out' in x]
    assert line.endswith('CosineAnnealingLR would begin after epoch 3 of 1.')
    state = torch.load(tmp_path / 'w/epoch_1.pth', weights_only=False)
    ends = [scheduler['end'] for scheduler in state['param_schedulers']]
    assert ends == [1, 3]  # three batches

    config = write_config(tmp_path / 'c.py', data, length=1, more=more)
    message = fails(capsys, 'train.py', config, *work)
    assert 'end should be larger than begin' in message


def test_each_optimizer_has_its_schedule():
    loop = SimpleNamespace(max_epochs=1, max_iters=4)  # one of iterations
    constant = dict(type='ConstantLR', by_epoch=False)
    schedulers = dict(a=dict(constant, end=9), b=[dict(constant, begin=5, end=9)])
    runner = SimpleNamespace(
        train_loop=loop, param_schedulers=schedulers, logger=logging.getLogger()
    )
    _shorten_schedule(runner)
    assert runner.param_schedulers == dict(a=[dict(constant, end=4)], b=[])
    assert schedulers['a'].get('end') == 9


def test_the_period_of_a_cosine():
    kept, _ = shorten_schedulers(dict(type='x', T_max=9, begin=1, end=10), {True: 4})
    assert kept == [dict(type='x', T_max=3, begin=1, end=4)]
    kept, _ = shorten_schedulers(dict(type='x', T_max=2), {True: 4})
    assert kept == [dict(type='x', T_max=2)]


def test_the_home_in_a_work_dir_is_expanded_before_it_is_looked_into(
    tmp_path, monkeypatch
):
    monkeypatch.setenv('HOME', str(tmp_path))
    args = SimpleNamespace(
        work_dir='~/work', config='c.py', launcher='none', local_rank=0
    )
    cfg = Config()
    merge_common_args(cfg, args, ())
    assert cfg.work_dir == str(tmp_path / 'work')
