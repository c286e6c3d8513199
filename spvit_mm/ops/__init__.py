"""Attention with spatial priors in plain torch.

The files import torch and nothing else. To use them without OpenMMLab, copy this
folder into your project; importing it as ``spvit_mm.ops`` imports all of spvit_mm.
"""

from .attention import ATTN_IMPLS, spatial_prior_attention
from .prior import check_keep, expand_prior

__all__ = ['ATTN_IMPLS', 'check_keep', 'expand_prior', 'spatial_prior_attention']
