"""The learned priors as maps over the relative offsets."""

from typing import NamedTuple

import numpy as np
import torch

from ..models import SpatialPrior


class PriorMap(NamedTuple):
    """The priors of one layer.

    Attributes:
        name (str): Which layer, in words.
        table (np.ndarray): (heads, 2H-1, 2W-1), entry [h, dy + H-1, dx + W-1]
            is the prior of head h for a key dx to the right of and dy below
            the query.
    """

    name: str
    table: np.ndarray


@torch.no_grad()
def collect_priors(model, hw=None):
    """Evaluate every spatial prior of a model.

    Args:
        model (nn.Module): An SPViT, or anything that holds one.
        hw (Tuple[int, int], optional): The grid (H, W). Defaults to None: the
            grid of the priors' training.

    Returns:
        List[PriorMap]: One of each SP-SA layer, in order; a single one where
        the whole network shares its prior.

    Raises:
        ValueError: If there is no spatial prior in the model, or no grid is
            known.
    """
    maps = []
    for name, module in model.named_modules():
        if not isinstance(module, SpatialPrior):
            continue
        grid = hw or module.grid
        if grid is None:
            raise ValueError(
                f'`hw` is needed: the prior {name!r} does not know its grid.'
            )
        parts = name.split('.')
        layer = 'all layers'
        if 'layers' in parts:
            layer = f'layer {int(parts[parts.index("layers") + 1]) + 1}'
        maps.append(PriorMap(layer, module(grid).float().cpu().numpy()))
    if not maps:
        raise ValueError(
            f'{type(model).__name__} has no spatial prior: no SP-SA layer (is '
            '`num_spsa_layers` 0 in its config?), so there is nothing to show.'
        )
    return maps


def draw_priors(maps, title=''):
    """Draw maps, one row a layer and one column a head.

    All share one diverging colour scale whose middle is 1, the neutral prior:
    above it the attention score of a key at that offset is amplified, below it
    damped, and under 0 inverted. The cross marks the zero offset, the query.

    Args:
        maps (List[PriorMap]): From :func:`collect_priors`.
        title (str): Written above. Defaults to ''.

    Returns:
        matplotlib.figure.Figure: The figure; ``figure.savefig(path)`` writes it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(maps), max(len(m.table) for m in maps)
    height, width = maps[0].table.shape[1:]
    cell = 1.4
    figure = Figure(
        figsize=(cell * columns + 1.6, cell * rows * height / width + 1.0),
        layout='constrained',
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    reach = max(float(np.abs(m.table - 1).max()) for m in maps)
    reach = max(reach, 1e-3)  # a neutral model has no range of its own
    image = None
    for row, m in zip(axes, maps, strict=True):
        row[0].set_ylabel(m.name)
        for head, ax in enumerate(row):
            ax.set_xticks([])
            ax.set_yticks([])
            if head >= len(m.table):
                ax.set_axis_off()
                continue
            down, right = (side // 2 for side in m.table.shape[1:])
            image = ax.imshow(
                m.table[head],
                cmap='RdBu_r',
                vmin=1 - reach,
                vmax=1 + reach,
                extent=(-right - 0.5, right + 0.5, down + 0.5, -down - 0.5),
            )
            ax.plot(0, 0, '+', color='black', markersize=7)
            if m is maps[0]:
                name = f'head {head + 1}' if len(m.table) > 1 else 'all heads'
                ax.set_title(name, fontsize='medium')
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label('prior (1 = neutral)')
    figure.suptitle(title, fontsize='medium')
    right, down = width // 2, height // 2
    figure.supxlabel(
        f'key to the left / right of the query (up to {right}), above / below '
        f'(up to {down})',
        fontsize='small',
    )
    return figure
