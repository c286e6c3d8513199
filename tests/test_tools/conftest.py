import pytest
import torch


@pytest.fixture(autouse=True, scope='session')
def _one_thread():
    """Tiny models are slower on several threads than on one."""
    torch.set_num_threads(1)
