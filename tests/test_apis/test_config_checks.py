"""What check_config lets pass; what it refuses is in test_tools/test_bad_training.py."""

import pytest
from mmengine.config import Config

from spvit_mm.apis.config_checks import check_config
from spvit_mm.apis.train import ENTRIES
from spvit_mm.utils import UserError


@pytest.mark.parametrize(
    'name',
    [
        *('model_a', 'train_cfg2', 'train_dataset', 'my_model', 'cfg', '_modl'),
        *('classes', 'evaluator', 'preprocessor', 'train_loader'),
    ],
)
def test_variables_of_a_users_own(name):
    check_config(Config({name: 1}))


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('modle', 'model'),
        ('optim_wraper', 'optim_wrapper'),
        ('custom_hook', 'custom_hooks'),
        ('param_schedulers', 'param_scheduler'),
        ('val_dataloder', 'val_dataloader'),
    ],
)
def test_slips_of_the_finger(name, meant):
    with pytest.raises(UserError, match=f'`{name}`, which nothing .* `{meant}`'):
        check_config(Config({name: 1}))


def test_names_of_classes_and_of_registered_parts():
    """A class may be called 'no', and a part may lie in another scope or be a class."""

    class Own:
        pass

    cfg = Config(
        dict(
            default_scope='mmpretrain',
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset',
                    dataset=dict(
                        type='CustomDataset',
                        metainfo=dict(classes=('yes', 'no'), answer='no'),
                        pipeline=[
                            dict(type='mmcv.LoadImageFromFile'),
                            dict(type=Own),
                            dict(type='Albumentations', transforms=[dict(type='Blur')]),
                            dict(
                                type='RandomApply', transforms=dict(type='RandomFlip')
                            ),
                        ],
                    ),
                )
            ),
            val_evaluator=[dict(type='Accuracy', topk=(1, 5)), dict(type='Evaluator')],
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=float('inf'))),
        )
    )
    check_config(cfg, *ENTRIES)
    with pytest.raises(UserError, match=r'`val_evaluator.0.topk` is \(1, 5\)'):
        check_config(Config({**cfg, 'model': dict(head=dict(num_classes=3))}), *ENTRIES)
