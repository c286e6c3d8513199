from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmpretrain.structures import DataSample

from spvit_mm.engine.hooks import FiniteHook
from spvit_mm.utils import UserError


def make_runner(loss: float):
    scalars = {'train/loss': HistoryBuffer([loss], [1])}
    hub = SimpleNamespace(log_scalars=scalars)
    model = torch.nn.Linear(2, 2)
    return SimpleNamespace(message_hub=hub, model=model, iter=6, cfg={})


class Unread:
    """A loss on an accelerator, which must not be waited for."""

    def __float__(self):
        raise AssertionError('was read')

    item = __float__


def test_the_image_of_a_bad_loss_is_named():
    hook, outputs = FiniteHook(), {'loss': Unread()}
    good, bad = torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.inf)
    samples = [DataSample(metainfo=dict(img_path=f'{i}.png')) for i in 'ab']
    batch = dict(inputs=[good, bad], data_samples=samples)
    hook.after_train_iter(make_runner(1.0), 0, batch, outputs)
    with pytest.raises(UserError, match=r'iteration 7 .* \(loss inf\). So is b.png of'):
        hook.after_train_iter(make_runner(float('inf')), 0, batch, outputs)
    batch = dict(inputs=torch.stack((good, bad)))
    with pytest.raises(UserError, match='So is image 1 of'):
        hook.after_train_iter(make_runner(float('nan')), 0, batch, outputs)


def test_no_checkpoint_of_a_diverged_training():
    """The last step of an epoch can do it, behind a loss that was finite."""
    runner, hook = make_runner(1.0), FiniteHook()
    state_dict = runner.model.state_dict()
    hook.before_save_checkpoint(runner, dict(state_dict=state_dict))
    state_dict['bias'][1] = float('inf')
    with pytest.raises(
        UserError, match='bias has become nan .* iteration 6: .* diverged'
    ):
        hook.before_save_checkpoint(runner, dict(state_dict=state_dict))
