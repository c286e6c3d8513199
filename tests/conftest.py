import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import spvit_mm  # noqa: F401


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """mmengine logs every parameter that init_weights touches."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    torch.manual_seed(0)
    yield
    logger.setLevel(level)


@pytest.fixture
def mmpretrain_scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield
