import pytest
import torch
from torch.utils.data import _utils


@pytest.fixture(autouse=True, scope='session')
def _quick():
    """Little models are slower on several threads, and workers slow to end.

    torch waits for this many seconds for each worker of an iterator that was left
    before its end.
    """
    torch.set_num_threads(1)
    _utils.MP_STATUS_CHECK_INTERVAL = 0.2
