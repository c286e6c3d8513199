import os

# Small models are slower on several threads, much slower where tests run side by
# side; set before torch reads it, and for the processes that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402
import torch  # noqa: E402
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch.utils.data import _utils

from spvit_mm.models import LookHereSpatialPrior


@MODELS.register_module()
class LookHereProduct(LookHereSpatialPrior):
    """Distances and directions for every way to combine, a product's too."""

    is_bias = False


@pytest.fixture(autouse=True, scope='session')
def _quick():
    """Little models are slower on several threads, and workers slow to end.

    torch waits for this many seconds for each worker of an iterator that was left
    before its end.
    """
    torch.set_num_threads(1)
    _utils.MP_STATUS_CHECK_INTERVAL = 0.2


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    """mmengine logs every parameter that init_weights touches."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    torch.manual_seed(0)
    # A runner leaves its scope behind; the next test must not find it.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield
    logger.setLevel(level)


@pytest.fixture
def mmpretrain_scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield
