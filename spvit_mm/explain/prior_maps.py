"""The learned priors as maps over the relative offsets."""

import re
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..models import SpatialPrior, SpatialPriorAttention
from ..models.attention import GridAttention, fit_mask
from ..utils import (
    UserError,
    figure_to_image,
    first_not_finite,
    new_figure,
    whole_file,
)

# Of offsets that a prior masks, in no colour map used here.
MASKED = '0.75'


class PriorMap(NamedTuple):
    """The priors of one layer.

    Attributes:
        name (str): Which layer, in words, and what the prior does to the scores
            where the layer has two.
        table (np.ndarray): (heads, 2H-1, 2W-1), entry [h, dy + H-1, dx + W-1]
            is the prior of head h for a key dx to the right of and dy below
            the query; nan where it is masked.
        added (bool): Whether the scores are not multiplied by it, but
            ``strength * (table - 1)`` is added to them. Defaults to False.
    """

    name: str
    table: np.ndarray
    added: bool = False


def why_no_priors(model) -> Optional[str]:
    """Why a model has no spatial prior, in a sentence; None if it has one."""
    modules = list(model.modules())
    if any(isinstance(module, SpatialPrior) for module in modules):
        return None
    start = f'{type(model).__name__} has no spatial prior: '
    for module in modules:
        if isinstance(module, GridAttention):
            return (
                f'{start}its position comes from {type(module).__name__}, which has no '
                'prior to show (tools/visualization/show_attention.py shows where its '
                'patches look).'
            )
    return (
        f'{start}no SP-SA layer (is `num_spsa_layers` 0 in its config?), so there is '
        'nothing to show.'
    )


@torch.no_grad()
def collect_priors(model, hw=None):
    """Evaluate every spatial prior of a model.

    Args:
        model (nn.Module): An SPViT, or anything that holds one.
        hw (Tuple[int, int], optional): The grid (H, W). Defaults to None: the
            grid of the priors' training.

    Returns:
        List[PriorMap]: One of each SP-SA layer, in order, and two where it multiplies
        by one prior and adds another; those of a single layer where the whole network
        shares its priors.

    Raises:
        UserError: If there is no spatial prior in the model, no grid is known, or
            a prior is not finite.
    """
    missing = why_no_priors(model)
    if missing:
        raise UserError(missing)
    maps = []
    for name, module in model.named_modules():
        if not isinstance(module, SpatialPrior):
            continue
        grid = hw or module.grid
        if grid is None:
            raise UserError(
                f'`hw` is needed: the prior {name!r} does not know its grid.'
            )
        parent, _, child = name.rpartition('.')
        parts = parent.split('.')
        layer = 'all layers'
        if 'layers' in parts:
            layer = f'layer {int(parts[parts.index("layers") + 1]) + 1}'
        owner = model.get_submodule(parent)
        combine = _combine(owner)
        added = combine == 'add' or child == 'bias_prior'
        if combine == 'both':
            layer += ', added' if added else ', multiplied'
        table, keep = module(grid), module.keep(grid)
        visible = table if keep is None else table.masked_fill(~keep, 1.0)
        if first_not_finite([(layer, visible)]):
            raise UserError(f'The prior of {layer} holds nan or infinity.')
        for mask in (keep, _kept(owner, grid, len(table))):
            if mask is not None:
                table = table.masked_fill(~mask, float('nan'))
        maps.append(PriorMap(layer, table.float().cpu().numpy(), added))
    return maps


def _combine(owner):
    """How the attention that owns a prior, or is inside its owner, uses it."""
    for module in owner.modules():
        if isinstance(module, SpatialPriorAttention):
            return module.combine
    return 'multiply'


def _kept(owner, grid, heads):
    """Offsets that an attention with such a prior keeps, (heads, 2H-1, 2W-1), or None.

    Of those that share a prior, one that keeps an offset is enough.
    """
    attentions = [m for m in owner.modules() if isinstance(m, SpatialPriorAttention)]
    if not attentions or any(attn.kept is None for attn in attentions):
        return None
    kept = torch.stack([fit_mask(attn.kept, grid) for attn in attentions]).any(0)
    return kept if heads > 1 else kept.any(0, keepdim=True)


def draw_priors(maps, title='', reach=None):
    """Draw maps, one row a layer and one column a head.

    All share one diverging colour scale whose middle is 1, the neutral prior: where
    it multiplies, the attention score of a key at that offset is amplified above 1,
    damped below it, and inverted under 0; where it is added, the score is raised above
    1 and lowered below it. The cross marks the zero offset, the query; grey is masked.

    Args:
        maps (List[PriorMap]): From :func:`collect_priors`.
        title (str): Written above. Defaults to ''.
        reach (float, optional): How far the colour scale goes from 1 to both
            sides. Defaults to None: as far as these maps do.

    Returns:
        matplotlib.figure.Figure: The figure; ``figure.savefig(path)`` writes it.
    """
    return draw_comparison({'': maps}, title, reach)


def draw_comparison(models, title='', reach=None):
    """Draw the priors of several models side by side, on one colour scale.

    Args:
        models (Dict[str, List[PriorMap]]): The models' names and maps.
        title (str): Written above. Defaults to ''.
        reach (float, optional): As of :func:`draw_priors`. Defaults to None.

    Returns:
        matplotlib.figure.Figure: As of :func:`draw_priors`, the columns of one
        model after those of the other; a layer that one of them lacks is left
        out there.
    """
    every = [m for maps in models.values() for m in maps]
    if any(',' in m.name for m in every):
        models = {
            name: [_named_by_use(m) for m in maps] for name, maps in models.items()
        }
    elif len({m.added for m in every}) > 1:
        models = {
            f'{name} (added)' if maps[0].added else name: maps
            for name, maps in models.items()
        }
    headings, groups = [], []
    for name, maps in models.items():
        heads = max(len(m.table) for m in maps)
        groups += [name] + [''] * (heads - 1)
        headings += (
            [f'head {h + 1}' for h in range(heads)] if heads > 1 else ['all heads']
        )
    names = dict.fromkeys(m.name for maps in models.values() for m in maps)
    names = sorted(names, key=lambda n: int((re.findall(r'\d+', n) or [0])[0]))
    rows = {}
    for layer in names:
        rows[layer] = []
        for maps in models.values():
            table = next((m.table for m in maps if m.name == layer), ())
            absent = max(len(m.table) for m in maps) - len(table)
            rows[layer] += [*table, *[None] * absent]
    return draw_tables(rows, headings, title, _bar_label(every), groups, reach)


def draw_strip(steps, title=''):
    """Draw how priors develop: one row a head, one column a checkpoint.

    Args:
        steps (Dict[str, List[PriorMap]]): Names of the checkpoints, in order,
            and the maps of the same model there.
        title (str): Written above. Defaults to ''.

    Returns:
        matplotlib.figure.Figure: As of :func:`draw_priors`.
    """
    rows = {}
    for maps in steps.values():
        for m in maps:
            for head, table in enumerate(m.table):
                name = f'{m.name}\nhead {head + 1}' if len(m.table) > 1 else m.name
                rows.setdefault(name, []).append(table)
    maps = [m for maps in steps.values() for m in maps]
    return draw_tables(rows, list(steps), title, _bar_label(maps))


def animate_priors(steps, title='', dpi=80):
    """Draw how priors develop: one frame a checkpoint, all on one colour scale.

    Args:
        steps (Dict[str, List[PriorMap]]): As of :func:`draw_strip`, at least two.
        title (str): Written above each frame, over the checkpoint's name.
            Defaults to ''.
        dpi (int): Pixels per inch. Defaults to 80.

    Returns:
        List[np.ndarray]: The frames, each (height, width, 3), uint8;
        :func:`write_gif` writes them.

    Raises:
        UserError: If there are fewer than two steps, or their layers, heads or
            grids differ.
    """
    if len(steps) < 2:
        raise UserError(
            f'An animation needs two checkpoints or more, got {len(steps)}.'
        )
    shapes = {
        name: [(m.name, m.table.shape) for m in maps] for name, maps in steps.items()
    }
    first = next(iter(shapes))
    for name, found in shapes.items():
        if found != shapes[first]:
            raise UserError(
                f'The priors of {first} and {name} differ in layers, heads or grid: '
                'give checkpoints of one training.'
            )
    reach = _reach(m.table for maps in steps.values() for m in maps)
    return [
        figure_to_image(draw_priors(maps, f'{title}\n{name}'.strip(), reach), dpi)
        for name, maps in steps.items()
    ]


def write_gif(frames, path, seconds=0.6):
    """Write frames as an endless GIF whose last frame stays four times as long.

    Args:
        frames (List[np.ndarray]): Each (height, width, 3), uint8, of one size.
        path (str): The file.
        seconds (float): How long a frame stays. Defaults to 0.6.
    """
    from PIL import Image

    # One palette for all, or colours would shift from frame to frame.
    palette = Image.fromarray(np.concatenate(frames)).quantize(256)
    first, *rest = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    durations = [round(1000 * seconds)] * len(rest) + [round(4000 * seconds)]
    with whole_file(path) as partial:
        first.save(
            partial,
            format='GIF',
            save_all=True,
            append_images=rest,
            duration=durations,
            loop=0,
            optimize=False,
        )


def _reach(tables, middle=1.0):
    """The largest distance from the middle: 1, the neutral prior."""
    reach = max(float(np.nanmax(np.abs(table - middle))) for table in tables)
    return max(reach, 1e-3)  # a neutral model has no range of its own


def _named_by_use(m):
    """A map beside those of layers that have two: its name says which it is."""
    use = 'added' if m.added else 'multiplied'
    return m if ',' in m.name else m._replace(name=f'{m.name}, {use}')


def _bar_label(maps):
    """What the colours mean, as far as it holds for all maps."""
    added = ', added to the scores\n' if all(m.added for m in maps) else ' '
    return f'prior{added}(1 = neutral)'


def draw_tables(rows, headings, title, bar_label, groups=None, reach=None, middle=1.0):
    """Draw tables (2H-1, 2W-1): ``rows`` maps a label to a table or None for each
    of ``headings``; ``groups`` are further words above the columns, and the colours go
    by ``reach`` (default: as far as the tables) to both sides of ``middle``."""
    tables = [t for row in rows.values() for t in row if t is not None]
    height, width = tables[0].shape
    cell = 1.4
    figure = new_figure(
        cell * len(headings) + 1.6, cell * len(rows) * height / width + 1.2
    )
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    reach = reach or _reach(tables, middle)
    image = None
    for i, (label, row) in enumerate(rows.items()):
        axes[i, 0].set_ylabel(label.replace(', ', '\n'))
        for j, (ax, table, heading) in enumerate(
            zip(axes[i], row, headings, strict=True)
        ):
            ax.set_xticks([])
            ax.set_yticks([])
            if i == 0:
                ax.set_title(heading, fontsize='medium')
            if i == 0 and any(groups or ()):
                # As wide as its columns, so over the first of them and to its right.
                ax.set_title(groups[j] + '\n', fontsize='medium', loc='left')
            if table is None:
                for spine in ax.spines.values():
                    spine.set_visible(False)
                continue
            ax.set_facecolor(MASKED)
            down, right = (side // 2 for side in table.shape)
            image = ax.imshow(
                table,
                cmap='RdBu_r',
                vmin=middle - reach,
                vmax=middle + reach,
                extent=(-right - 0.5, right + 0.5, down + 0.5, -down - 0.5),
            )
            ax.plot(0, 0, '+', color='black', markersize=7)
    shrink = min(0.8, 7 / figure.get_figheight())
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=25)
    bar.set_label(bar_label)
    figure.suptitle(title, fontsize='medium')
    grey = '; grey: masked' if any(np.isnan(table).any() for table in tables) else ''
    figure.supxlabel(
        f'key to the left / right of the query (up to {width // 2}), above / below '
        f'(up to {height // 2}){grey}',
        fontsize='small',
    )
    return figure
