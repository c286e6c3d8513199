"""What a checkpoint did to a model is told as it was."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from spvit_mm.engine.hooks import LoadReportHook
from spvit_mm.utils import UserError


class Resizing(nn.Module):
    """Makes a loaded table fit, and drops an entry, by a state-dict hook."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4))
        self._register_load_state_dict_pre_hook(self._fit)

    def _fit(self, state_dict, prefix, *args):
        state_dict[prefix + 'table'] = state_dict[prefix + 'table'][:4]
        state_dict.pop(prefix + 'old', None)


class Model(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = Resizing()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)


TRAINING = dict(meta=dict(epoch=3, iter=30), message_hub={}, optimizer={})


def load(tmp_path, model, state_dict, partial='warn', resume=False) -> list:
    """Load as a runner does; the messages of the hook."""
    torch.save({'state_dict': state_dict}, tmp_path / 'c.pth')
    hook, messages = LoadReportHook(partial), []
    logger = SimpleNamespace(warning=messages.append)
    runner = SimpleNamespace(model=model, _resume=resume, logger=logger)
    hook.after_load_checkpoint(runner, {'state_dict': state_dict, **TRAINING})
    load_checkpoint(model, str(tmp_path / 'c.pth'), logger=logging.getLogger('quiet'))
    hook.before_train(runner)
    assert not model._load_state_dict_post_hooks
    return messages


def test_silent_where_it_fits(tmp_path):
    model = Model()
    assert load(tmp_path, model, Model().state_dict()) == []
    # What the model's own hooks make fit, fits; so do names of a wrapped model.
    state = {f'module.{k}': v for k, v in Model().state_dict().items()}
    state['module.stem.table'] = torch.ones(9)
    state['module.stem.old'] = torch.ones(1)
    del state['module.norm.num_batches_tracked']
    assert load(tmp_path, model, state) == []
    assert model.stem.table.eq(1).all()


def test_partial(tmp_path):
    state = Model(classes=5).state_dict()
    del state['norm.weight']
    state['neck.weight'] = torch.ones(1)
    (message,) = load(tmp_path, Model(), state)
    assert '4 of the 7 parameters and buffers' in message
    assert '1 missing in it: norm.weight;' in message
    assert '2 that do not fit: size mismatch for head.weight: ' in message
    assert 'shape torch.Size([5]) from checkpoint, ' in message
    assert '1 unknown to the model: neck.weight.' in message
    with pytest.raises(UserError, match='--allow-partial'):
        load(tmp_path, Model(), state, partial='error')
    with pytest.raises(UserError, match='cannot be resumed'):
        load(tmp_path, Model(), state, resume=True)


def test_nothing(tmp_path):
    state = {f'layer{i}': torch.ones(1) for i in range(25)}
    state['stem.table'] = torch.ones(3)  # too short to be made to fit
    with pytest.raises(UserError, match='0 of the 7') as error:
        load(tmp_path, Model(), state)
    assert '25 unknown to the model: layer0, layer1,' in str(error.value)
    assert str(error.value).count('layer') == 10
    assert 'size mismatch for stem.table' in str(error.value)


def test_what_resuming_needs(tmp_path):
    messages, model = [], Model()
    logger = SimpleNamespace(warning=messages.append)

    def after_load(resume, **content):
        runner = SimpleNamespace(model=model, _resume=resume, logger=logger)
        content['state_dict'] = model.state_dict()
        hook = LoadReportHook()
        hook.after_load_checkpoint(runner, content)
        hook.before_train(runner)

    published = dict(meta=dict(epoch=3, iter=30))
    for content in ({}, dict(TRAINING, meta={}), dict(TRAINING, meta=None), published):
        with pytest.raises(
            UserError, match='cannot be resumed.*not the state of a tra'
        ):
            after_load(True, **content)
        after_load(False, **content)
    after_load(True, **TRAINING)
    assert messages == []
    after_load(True, **{k: v for k, v in TRAINING.items() if k != 'optimizer'})
    (message,) = messages
    assert 'no state of the optimizer' in message
    assert 'after epoch 3, iteration 30' in message


def test_argument():
    with pytest.raises(ValueError, match="'warn' or 'error', got 'no'"):
        LoadReportHook('no')
