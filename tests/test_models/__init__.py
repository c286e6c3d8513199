import torch
from mmengine.utils import digit_version

# float16 has autocast on the CPU since torch 2.3.
AUTOCAST_DTYPES = [torch.bfloat16]
if digit_version(torch.__version__) >= digit_version('2.3'):
    AUTOCAST_DTYPES.append(torch.float16)
