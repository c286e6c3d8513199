"""What a trained model has learned."""

from .prior_maps import PriorMap, collect_priors, draw_priors

__all__ = ['PriorMap', 'collect_priors', 'draw_priors']
