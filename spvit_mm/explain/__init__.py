"""What a trained model has learned."""

from .attention_maps import (
    MeanAttention,
    QueryAttention,
    draw_mean_attention,
    draw_query_attention,
    format_distances,
    mean_attention,
    query_attention,
    write_distances,
)
from .binarize import (
    Kept,
    OffsetMass,
    keep_offsets,
    offset_mass,
    sparsify,
)
from .prior_maps import (
    PriorMap,
    animate_priors,
    collect_priors,
    draw_comparison,
    draw_priors,
    draw_strip,
    why_no_priors,
    write_gif,
)
from .prior_stats import HeadFocus, format_focus, head_focus, write_focus
from .recording import (
    AttentionMap,
    Recording,
    attention_terms,
    find_attentions,
    record_attention,
)
from .relevance import METHODS as RELEVANCE_METHODS
from .relevance import (
    Perturbation,
    class_scores,
    draw_relevance,
    perturbation_test,
    relevance_maps,
)

__all__ = [
    'Kept',
    'OffsetMass',
    'keep_offsets',
    'offset_mass',
    'sparsify',
    'RELEVANCE_METHODS',
    'Perturbation',
    'class_scores',
    'draw_relevance',
    'perturbation_test',
    'relevance_maps',
    'AttentionMap',
    'HeadFocus',
    'MeanAttention',
    'PriorMap',
    'QueryAttention',
    'Recording',
    'animate_priors',
    'attention_terms',
    'collect_priors',
    'draw_comparison',
    'draw_priors',
    'draw_strip',
    'draw_mean_attention',
    'draw_query_attention',
    'find_attentions',
    'format_distances',
    'format_focus',
    'head_focus',
    'mean_attention',
    'query_attention',
    'record_attention',
    'why_no_priors',
    'write_distances',
    'write_focus',
    'write_gif',
]
