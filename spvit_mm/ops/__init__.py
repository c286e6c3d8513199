"""Attention with spatial priors in plain torch; it knows nothing of mmengine."""

from .attention import ATTN_IMPLS, spatial_prior_attention
from .prior import expand_prior

__all__ = ['ATTN_IMPLS', 'expand_prior', 'spatial_prior_attention']
