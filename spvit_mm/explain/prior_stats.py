"""What each head's prior looks for, in numbers."""

import math
from typing import NamedTuple

import numpy as np

from ..utils import write_csv


class HeadFocus(NamedTuple):
    """The prior of one head.

    The focus is the weight w(r) = f(r) - min f, divided by its sum over all
    offsets r of the grid (the same for all, where the prior is constant). Masked
    offsets count as the head's lowest prior and have no weight.

    Attributes:
        layer (str): Which layer, in words, and what the prior does there if it has two.
        head (int): Which head, counted from 1.
        low (float): The smallest prior.
        high (float): The largest prior.
        radius (float): Effective radius, the mean distance of the focus from
            the query: sum w(r) ||r||, in patches.
        locality (float): 1 - radius / (radius of the constant prior): 1 looks
            at the query alone, 0 is as wide as the constant prior, less than
            0 looks at the far ones.
        right (float): Mean of r_x under w, in patches; negative is left.
        down (float): Mean of r_y under w, in patches; negative is up.
        difference (float): Root mean square difference from the priors of the
            layer's other heads; nan where there is no other.
    """

    layer: str
    head: int
    low: float
    high: float
    radius: float
    locality: float
    right: float
    down: float
    difference: float

    @property
    def direction(self):
        """Where the focus lies from the query: up, right, down-left, .. or '-'
        where it is less than a twentieth of the effective radius off it."""
        if math.hypot(self.right, self.down) <= 0.05 * self.radius:
            return '-'
        names = (
            'right', 'down-right', 'down', 'down-left',
            'left', 'up-left', 'up', 'up-right',
        )  # fmt: skip
        return names[round(math.atan2(self.down, self.right) / (math.pi / 4)) % 8]


def head_focus(maps) -> list[HeadFocus]:
    """The focus of every head.

    Args:
        maps (List[PriorMap]): From :func:`~spvit_mm.explain.collect_priors`.

    Returns:
        List[HeadFocus]: One of each layer and head, in order.
    """
    result = []
    for m in maps:
        tables = m.table.astype(np.float64)
        seen = ~np.isnan(tables)
        lowest = np.nanmin(tables, axis=(1, 2), keepdims=True)
        tables = np.where(seen, tables, lowest)
        heads, rows, columns = tables.shape
        dy, dx = np.mgrid[:rows, :columns]
        dy, dx = dy - rows // 2, dx - columns // 2
        distance = np.hypot(dx, dy)
        for head, table in enumerate(tables):
            weight = table - table.min()
            if weight.sum() <= 1e-12:
                weight = seen[head].astype(np.float64)
            weight /= weight.sum()
            radius = float((weight * distance).sum())
            reach = float(distance.mean())
            others = np.delete(tables, head, axis=0)
            difference = math.nan
            if heads > 1:
                difference = float(np.sqrt(np.square(others - table).mean()))
            result.append(
                HeadFocus(
                    layer=m.name,
                    head=head + 1,
                    low=float(table.min()),
                    high=float(table.max()),
                    radius=radius,
                    locality=1 - radius / reach if reach else 0.0,
                    right=float((weight * dx).sum()),
                    down=float((weight * dy).sum()),
                    difference=difference,
                )
            )
    return result


def format_focus(focus) -> str:
    """A table of text, one line a head."""
    width = max([12, *(len(f.layer) for f in focus)])
    lines = [
        f'{"layer":<{width}} {"head":>4} {"low":>7} {"high":>7} {"radius":>7} '
        f'{"locality":>8} {"right":>6} {"down":>6} {"difference":>10}  direction'
    ]
    for f in focus:
        difference = '-' if math.isnan(f.difference) else f'{f.difference:.3f}'
        lines.append(
            f'{f.layer:<{width}} {f.head:>4} {f.low:>7.3f} {f.high:>7.3f} {f.radius:>7.2f} '
            f'{f.locality:>8.2f} {f.right:>6.2f} {f.down:>6.2f} {difference:>10}  '
            f'{f.direction}'
        )
    return '\n'.join(lines)


def write_focus(path, focus) -> None:
    """Write the table as a CSV file."""
    rows = [[*HeadFocus._fields, 'direction']]
    for f in focus:
        rows.append([f.layer, f.head, *(f'{x:.6g}' for x in f[2:]), f.direction])
    write_csv(path, rows)
