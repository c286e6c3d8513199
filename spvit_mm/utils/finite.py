"""Numbers that are none."""

from collections.abc import Iterable
from typing import Optional

import torch


def first_not_finite(named: Iterable) -> Optional[str]:
    """The name of the first tensor that holds nan or infinity; None if none does.

    Args:
        named (Iterable[Tuple[str, Tensor]]): Names and tensors, such as
            ``model.state_dict().items()``; what is no tensor is passed over.
    """
    for name, tensor in named:
        if torch.is_tensor(tensor) and not torch.isfinite(tensor).all():
            return name
    return None
