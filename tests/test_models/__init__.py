import torch
from mmengine.utils import digit_version

# float16 has autocast on the CPU since torch 2.3.
AUTOCAST_DTYPES = [torch.bfloat16]
if digit_version(torch.__version__) >= digit_version('2.3'):
    AUTOCAST_DTYPES.append(torch.float16)


def loss_of(out):
    """A loss that a final LayerNorm leaves something to learn.

    The sum of its output, or of the squares, hardly depends on what goes in. This is
    the mean over the samples of ``out`` (B, ...) along a fixed random direction.
    """
    direction = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(7))
    return (out.float() * direction).flatten(1).sum(dim=1).mean()
