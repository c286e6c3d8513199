import pytest
from mmpretrain.registry import HOOKS

from spvit_mm.engine.hooks import DataCheckHook
from tests.test_engine.tiny import make_data, write_config
from tests.test_tools.test_train_test import command


def test_argument_and_second_name():
    with pytest.raises(ValueError, match="'error' or 'skip', got 'no'"):
        DataCheckHook('no')
    hook = HOOKS.build(dict(type='SegDataCheckHook', corrupt_images='skip'))
    assert type(hook) is DataCheckHook


@pytest.mark.parametrize('interval', [3, 12])
def test_images_left_out_are_counted_on_the_way(interval, tmp_path, capsys):
    """An iteration loop is one epoch: its end may be days away."""
    data = make_data(tmp_path)
    (data / 'train/a/0.png').write_bytes(b'no image')
    # Every 3 batches have the bad one of 12 images once; validation is every 4.
    config = write_config(
        tmp_path / 'c.py', data, by_epoch=False, length=12, interval=interval
    )
    work = ('--work-dir', tmp_path / 'w')
    command('train.py', config, *work, '--skip-corrupt-images')
    lines = capsys.readouterr().out.splitlines()

    def first(words):
        return next(i for i, line in enumerate(lines) if words in line)

    count = first('that could not be read were left out so far')
    assert count < first('(val)')
    assert (count < first('Saving checkpoint')) == (interval == 12)
