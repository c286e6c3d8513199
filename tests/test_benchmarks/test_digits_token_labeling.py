import argparse

import digits_token_labeling as script
import pytest
from experiments import digest, run_cli, trained
from mmengine.config import Config


def test_students_are_known_by_their_maps(tmp_path):
    args = argparse.Namespace(seeds=2, epochs=4)
    runs = script.plan_students(tmp_path / 'digits', tmp_path / 'maps-a', args)
    assert [(run.setting, run.seed) for run in runs] == [
        ('without', 0), ('with', 0), ('without', 1), ('with', 1),
    ]  # fmt: skip
    others = script.plan_students(tmp_path / 'digits', tmp_path / 'maps-b', args)
    same = [a.key == b.key for a, b in zip(runs, others, strict=True)]
    assert same == [True, False, True, False]
    elsewhere = script.plan_students(tmp_path / 'x/digits', tmp_path / 'maps-a', args)
    assert [run.key for run in elsewhere] == [run.key for run in runs]


def test_configs_read_the_digits(tmp_path):
    cfg = script.read_config(script.STUDENTS['with'], tmp_path, None)
    assert isinstance(cfg, Config)
    data = cfg.train_dataloader.dataset.dataset
    assert (data.data_root, data.data_prefix) == (str(tmp_path), 'train')
    data = cfg.val_dataloader.dataset
    assert (data.data_root, data.data_prefix) == (str(tmp_path), 'test')
    # evaluated once, at the end
    assert cfg.train_cfg.val_interval == cfg.train_cfg.max_epochs == 20
    longer = script.read_config(script.STUDENTS['with'], tmp_path, 30)
    assert digest(trained(longer)) != digest(trained(cfg))


@pytest.mark.parametrize(
    ('argv', 'words'),
    [(['--epochs', '3'], 'from 4 on'), (['--seeds', '0'], 'from 1 on')],
)
def test_bad_arguments(argv, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run_cli(script.main, 'x.py', [*argv, '--work-dir', str(tmp_path / 'new')])
    assert error.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()
