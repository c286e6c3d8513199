"""Where patches look, head by head: one of them, with what makes its attention, or all
on average."""

from typing import NamedTuple, Optional

import numpy as np
import torch

from ..models.priors.base import relative_offsets
from ..ops.prior import all_offsets
from ..utils import UserError, new_figure, write_csv
from .prior_maps import MASKED, draw_tables
from .recording import evaluating, layer_name, patch_grid, record_attention

# How many powers of 2 a picture of the mean attention tells apart, up and down.
MOST = 5


class QueryAttention(NamedTuple):
    """What one query patch sees, in one layer.

    Attributes:
        layer (str): Which layer, in words.
        kind (str): 'prior', 'bias', 'both', 'gated', 'rotary' or 'vanilla', see
            :class:`~spvit_mm.explain.AttentionMap`.
        content (np.ndarray): Scaled content scores (heads, H, W).
        position (np.ndarray, optional): The prior, bias or positional
            attention (heads, H, W); None in a rotary or vanilla layer.
        scores (np.ndarray, optional): Those that the softmax takes (heads, H,
            W), for SP-SA the product; None for gated attention.
        weights (np.ndarray): The attention (heads, H, W), which with the extra
            tokens' share has sum 1.
        bias (np.ndarray, optional): What is added for 'both' (heads, H, W).
        keep (np.ndarray, optional): Which keys are not masked (heads, H, W), bool;
            None if none is.
    """

    layer: str
    kind: str
    content: np.ndarray
    position: Optional[np.ndarray]
    scores: Optional[np.ndarray]
    weights: np.ndarray
    bias: Optional[np.ndarray] = None
    keep: Optional[np.ndarray] = None


@torch.no_grad()
def query_attention(model, image, query: tuple[int, int]):
    """The attention of one patch of one image, in every layer.

    Args:
        model (nn.Module): A backbone or classifier, see
            :func:`~spvit_mm.explain.record_attention`.
        image (Tensor): (1, 3, h, w), as the model takes it (normalized).
        query (Tuple[int, int]): Row and column of the patch, from 0.

    Returns:
        List[QueryAttention]: One of each layer.

    Raises:
        UserError: If the patch lies outside the grid, or the grid is unknown.
    """
    with evaluating(model), record_attention(model) as recording:
        model(image)
    height, width = patch_grid(recording, model)
    row, column = query
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f'`query` must be a row in 0..{height - 1} and a column in '
            f'0..{width - 1}, the grid of this image, got {tuple(query)}.'
        )
    result = []
    for m in recording.maps:
        extra = m.weights.shape[-1] - height * width
        index = extra + row * width + column

        def read(x, extra=extra, index=index):
            if x is None:
                return None
            x = x[0, :, index, extra:].unflatten(-1, (height, width))
            return (x if x.dtype == torch.bool else x.float()).cpu().numpy()

        result.append(
            QueryAttention(
                layer=layer_name(m.name),
                kind=m.kind,
                content=read(m.content),
                position=read(m.position),
                scores=read(m.scores),
                weights=read(m.weights),
                bias=read(m.bias),
                keep=read(m.keep),
            )
        )
    return result


class MeanAttention(NamedTuple):
    """Where the patches look on average, in one layer.

    Only what patches give each other counts: each query's attention to the patches has
    sum 1, whatever it gives to a class token.

    Attributes:
        layer (str): Which layer, in words.
        kind (str): See :class:`QueryAttention`.
        table (np.ndarray): (heads, 2H-1, 2W-1), entry [h, dy + H-1, dx + W-1] is the
            attention that head h gives a key dx to the right of and dy below the query,
            the mean over all such pairs of all images, where 1 is an even attention to
            all patches; nan where it is masked.
        distance (np.ndarray): Of each head, the mean distance from a query to what it
            attends to, in patches (heads,).
        even (float): That distance of an even attention.
    """

    layer: str
    kind: str
    table: np.ndarray
    distance: np.ndarray
    even: float


@torch.no_grad()
def mean_attention(model, batches):
    """The attention of all patches by offset, in every layer.

    Args:
        model (nn.Module): A backbone or classifier, see
            :func:`~spvit_mm.explain.record_attention`.
        batches (Iterable[Tensor]): Images (B, 3, h, w) of one size, as the model takes
            them (normalized).

    Returns:
        List[MeanAttention]: One of each layer.

    Raises:
        UserError: If there is no image, images differ in size, or the layers have no
            common grid.
    """
    kinds, sums, masked, counts = {}, {}, {}, {}
    grid = None
    with evaluating(model), record_attention(model) as recording:
        for images in batches:
            model(images)
            found = patch_grid(recording, model)
            if grid is None:
                grid = found
                place = _table_places(grid)
            elif found != grid:
                raise UserError(
                    'All images must have one size to average over, got some that make '
                    f'{grid[0]} x {grid[1]} and {found[0]} x {found[1]} patches. Take '
                    'one image, or let the pipeline resize them.'
                )
            for m in recording.maps:
                extra = m.weights.shape[-1] - len(place)
                near = m.weights[:, :, extra:, extra:].double()
                total = near.sum(-1, keepdim=True).clamp(min=np.finfo(float).tiny)
                kinds[m.name] = m.kind
                counts[m.name] = counts.get(m.name, 0) + len(images)
                by_offset = _sum_by_offset((near / total).sum(0), place)
                sums[m.name] = sums.get(m.name, 0) + by_offset
                if m.keep is not None and m.name not in masked:
                    seen = m.keep[0, :, extra:, extra:].double()
                    masked[m.name] = _sum_by_offset(seen, place) == 0
    if grid is None:
        raise UserError('`batches` holds no image to average over.')
    pairs = np.bincount(place.flatten())
    distance = relative_offsets(grid).double().norm(dim=-1).flatten().numpy()
    names = list(map(layer_name, sums))
    if len(set(names)) < len(names):
        names = list(sums)
    result = []
    for layer, (name, total) in zip(names, sums.items(), strict=True):
        mean = total / counts[name] / len(place)
        table = mean / pairs * len(place) ** 2
        table[masked.get(name, np.zeros_like(table, dtype=bool))] = np.nan
        result.append(
            MeanAttention(
                layer=layer,
                kind=kinds[name],
                table=table.reshape(-1, 2 * grid[0] - 1, 2 * grid[1] - 1),
                distance=(mean * distance).sum(1),
                even=float((pairs * distance).sum() / len(place) ** 2),
            )
        )
    return result


def _table_places(grid):
    """Where a flat table (2H-1) (2W-1) holds each pair (query, key), (N, N)."""
    rows, columns = all_offsets(grid, 'cpu')
    return (rows * (2 * grid[1] - 1) + columns).numpy()


def _sum_by_offset(weights, place):
    """(heads, N, N) summed over the pairs of each offset, (heads, (2H-1) (2W-1))."""
    heads = weights.flatten(1).cpu().numpy()
    return np.stack([np.bincount(place.flatten(), head) for head in heads])


def draw_mean_attention(layers, title=''):
    """Draw :func:`mean_attention`, one row per layer and one column per head.

    The colours are powers of 2: 0 is an even attention, 5 is 32 times that or more, -5 a
    32nd of it or less. The cross marks the query; grey is masked.

    Args:
        layers (List[MeanAttention]): From :func:`mean_attention`.
        title (str): Written above. Defaults to ''.

    Returns:
        matplotlib.figure.Figure: The figure.
    """
    heads = max(len(x.table) for x in layers)
    rows = {
        x.layer: [
            *np.log2(np.clip(x.table, 2.0**-MOST, 2.0**MOST)),
            *[None] * (heads - len(x.table)),
        ]
        for x in layers
    }
    label = 'attention over an even one\n(powers of 2)'
    headings = [f'head {i + 1}' for i in range(heads)]
    return draw_tables(rows, headings, title, label, reach=MOST, middle=0.0)


def format_distances(layers) -> str:
    """The distances of :func:`mean_attention` as a table of text, one line per layer."""
    width = max(len(x.layer) for x in layers)
    heads = max(len(x.distance) for x in layers)
    lines = [
        f'Mean distance of the attention in patches; an even one: {layers[0].even:.2f}',
        f'{"":<{width}}   mean '
        + ''.join(f'{f"head {i + 1}":>8}' for i in range(heads)),
    ]
    for x in layers:
        own = ''.join(f'{distance:>8.2f}' for distance in x.distance)
        lines.append(f'{x.layer:<{width}} {x.distance.mean():>6.2f} {own}')
    return '\n'.join(lines)


def write_distances(path, layers) -> None:
    """Write the distances of :func:`mean_attention` as a CSV file."""
    rows = [['layer', 'kind', 'head', 'distance', 'even']]
    for x in layers:
        for i, distance in enumerate(x.distance):
            rows.append([x.layer, x.kind, i + 1, f'{distance:.6g}', f'{x.even:.6g}'])
    write_csv(path, rows)


# The words for content, position, bias, scores and weights; None is not drawn.
ROWS = {
    'prior': ('content score', 'prior', None, 'product', 'attention'),
    'bias': ('content score', 'bias', None, 'sum', 'attention'),
    'both': ('content score', 'prior', 'bias', 'product + bias', 'attention'),
    'gated': ('content score', 'position', None, None, 'attention'),
    'rotary': ('rotated score', None, None, None, 'attention'),
    'vanilla': ('content score', None, None, None, 'attention'),
}


def draw_query_attention(attention, query, picture=None, title=''):
    """Draw one layer, a column a head.

    Scores share a diverging scale around 0, the prior has one around 1, and the
    attention one from 0; the frame marks the query, and grey keys are masked.

    Args:
        attention (QueryAttention): One layer of :func:`query_attention`.
        query (Tuple[int, int]): The patch (row, column).
        picture (np.ndarray, optional): The image (h, w, 3), uint8, RGB, shown
            in front. Defaults to None.
        title (str): Written above. Defaults to ''.

    Returns:
        matplotlib.figure.Figure: The figure.
    """
    from matplotlib.patches import Rectangle

    names = ROWS[attention.kind]
    values = (
        attention.content,
        attention.position,
        attention.bias,
        attention.scores,
        attention.weights,
    )
    rows = [(n, v) for n, v in zip(names, values, strict=True) if n and v is not None]
    if attention.keep is not None:
        content, *others = rows
        rows = [content, *((n, np.where(attention.keep, v, np.nan)) for n, v in others)]
    heads, height, width = attention.weights.shape
    lead = int(picture is not None)
    cell = 1.5
    figure = new_figure(
        cell * (heads + lead) + 1.4, cell * len(rows) * height / width + 0.9
    )
    axes = figure.subplots(len(rows), heads + lead, squeeze=False)
    shared = max(
        np.nanmax(np.abs(maps))
        for name, maps in rows
        if name not in ('prior', 'bias', 'position', 'attention')
    )
    row, column = query
    for i, (name, maps) in enumerate(rows):
        if name == 'attention' or name == 'position':
            style = dict(cmap='viridis', vmin=0, vmax=float(np.nanmax(maps)))
        elif name == 'prior':
            reach = max(float(np.nanmax(np.abs(maps - 1))), 1e-3)
            style = dict(cmap='PuOr_r', vmin=1 - reach, vmax=1 + reach)
        elif name == 'bias':
            reach = max(float(np.nanmax(np.abs(maps))), 1e-3)
            style = dict(cmap='PuOr_r', vmin=-reach, vmax=reach)
        else:
            style = dict(cmap='RdBu_r', vmin=-shared, vmax=shared)
        for ax in axes[i]:
            ax.set_xticks([])
            ax.set_yticks([])
        if lead:
            if i == 0:
                axes[i, 0].imshow(picture)
                h, w = picture.shape[:2]
                corner = (column * w / width - 0.5, row * h / height - 0.5)
                axes[i, 0].add_patch(
                    Rectangle(
                        corner, w / width, h / height, fill=False, ec='red', lw=1.5
                    )
                )
                axes[i, 0].set_title('query', fontsize='medium')
            else:
                axes[i, 0].set_axis_off()
        axes[i, lead].set_ylabel(name)
        for head in range(heads):
            ax = axes[i, lead + head]
            ax.set_facecolor(MASKED)
            image = ax.imshow(maps[min(head, len(maps) - 1)], **style)
            ax.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec='red', lw=1.5)
            )
            if i == 0:
                ax.set_title(f'head {head + 1}', fontsize='medium')
        figure.colorbar(image, ax=list(axes[i]), shrink=0.85, pad=0.01)
    figure.suptitle(title or attention.layer, fontsize='medium')
    return figure
