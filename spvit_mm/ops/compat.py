"""What differs between the versions of torch, and what dynamo cannot trace."""

from __future__ import annotations

import torch

try:
    is_compiling = torch.compiler.is_compiling
except AttributeError:  # torch < 2.3
    is_compiling = torch._dynamo.is_compiling


def is_free(hw: tuple) -> bool:
    """Whether the sides of a grid are left open, as symbols of an exporter.

    Such a side is no number: comparing it would fix it.
    """
    return not all(isinstance(side, int) for side in hw)


def is_traced() -> bool:
    """Whether the operations are being recorded instead of (only) run."""
    return is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute priors, scores and softmax in: float32 at least.

    torch.promote_types says the same, but dynamo of torch < 2.3 cannot trace it.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> torch.autocast:
    """Autocast switched off on a device, for what is computed in float32 at least.

    Autocast knows no meta device, on which large models are built.
    """
    return torch.autocast(
        'cpu' if device.type == 'meta' else device.type, enabled=False
    )
