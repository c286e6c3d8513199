"""Settings beside one another: paired statistics, tables and figures."""

from __future__ import annotations

import numpy as np


def holm(p_values: list[float]) -> np.ndarray:
    """Holm's correction of p-values for the number of comparisons.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than the
    one before it (Holm 1979). A nan is no comparison and stays.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.sum(~np.isnan(p))]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return adjusted


def seed_deviation(values: dict[str, list[float]]) -> tuple[float, int]:
    """The deviation of one value from what its setting and its seed explain.

    Args:
        values (dict): By setting, one value per seed, the seeds in one order; the last
            ones may be missing.

    Returns:
        tuple[float, int]: The standard deviation of the residuals of a least-squares
        fit of one number per setting plus one per seed, and its degrees of freedom.
        The deviation is nan where there are none.
    """
    found = [
        (i, j, x) for i, own in enumerate(values.values()) for j, x in enumerate(own)
    ]
    setting, seed, top1 = map(np.array, zip(*found, strict=True))
    model = np.concatenate(
        [np.eye(setting.max() + 1)[setting], np.eye(seed.max() + 1)[seed]], axis=1
    )
    fit, _, rank, _ = np.linalg.lstsq(model, top1, rcond=None)
    freedom = len(found) - int(rank)
    squares = np.sum((top1 - model @ fit) ** 2)
    return (np.sqrt(squares / freedom) if freedom else np.nan), freedom


def compare(
    values: dict[str, list[float]],
    against: dict[str, str],
    pooled: bool | dict[str, list[float]] = False,
) -> list[dict]:
    """Mean and deviation of each setting, and its difference to its baseline.

    Args:
        values (dict): By setting, one value per seed, the seeds in one order. Where a
            setting or its baseline lacks the last seeds, the others are compared.
        against (dict): The baseline of each setting.
        pooled (bool | dict): Take the deviation of a seed from all settings together
            (:func:`seed_deviation`), or from those given here, not from one setting's
            differences: for two or three seeds, whose own deviation is mostly chance.
            It takes all settings to vary alike. A single seed has an interval then,
            too. Defaults to False.

    Returns:
        list[dict]: One row per setting. ``interval`` is half the 95 % interval of the
        difference, by a t-test of the seeds' differences or with the pooled deviation,
        ``p`` its p-value and ``p_holm`` that value corrected for all comparisons.
    """
    from scipy import stats

    deviation, freedom = np.nan, 0
    if pooled:
        deviation, freedom = seed_deviation(values if pooled is True else pooled)
    rows = []
    for setting, found in values.items():
        found, n = np.array(found, dtype=float), len(found)
        baseline = against[setting]
        pairs = min(n, len(values[baseline]))
        differences = found[:pairs] - np.array(values[baseline], dtype=float)[:pairs]
        std = found.std(ddof=1) if n > 1 else np.nan
        row = dict(setting=setting, seeds=n, mean=found.mean(), std=std)
        row.update(against=baseline, difference=differences.mean())
        row.update(interval=np.nan, p=np.nan)
        if pooled:
            error = deviation * np.sqrt(2 / pairs) if setting != baseline else 0.0
        else:
            freedom = pairs - 1
            error = stats.sem(differences) if freedom else np.nan
        if freedom:
            row.update(interval=error * stats.t.ppf(0.975, freedom))
            if setting != baseline:
                with np.errstate(divide='ignore', invalid='ignore'):
                    t = abs(differences.mean()) / error
                # 0 / 0: no seed differs at all
                row.update(p=np.nan_to_num(2 * stats.t.sf(t, freedom), nan=1.0))
        rows.append(row)
    for row, p in zip(rows, holm([row['p'] for row in rows]), strict=True):
        row['p_holm'] = p
    return rows


def comparison_table(rows: list[dict]) -> str:
    """The rows of :func:`compare` in Markdown."""
    lines = [
        '| setting | top-1 (%) | std | difference | to | 95 % interval | p (Holm) |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        std = '' if np.isnan(row['std']) else f'{row["std"]:.2f}'
        cells = [row['setting'], f'{row["mean"]:.2f}', std]
        if row['setting'] == row['against']:
            cells += [''] * 4
        else:
            low, high = (row['difference'] + s * row['interval'] for s in (-1, 1))
            cells += [f'{row["difference"]:+.2f}', row['against']]
            one = np.isnan(row['interval'])
            cells += ['one seed' if one else f'{low:+.2f} .. {high:+.2f}']
            cells += ['' if one else f'{row["p_holm"]:.3f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def values_table(heads: list[str], values: dict[str, list], corner: str) -> str:
    """Mean and deviation over seeds in Markdown.

    Args:
        heads (list[str]): Of the columns.
        values (dict): By the name of a row, for each column the values of the seeds.
        corner (str): Head of the names.
    """

    def cell(found):
        spread = f' ± {np.std(found, ddof=1):.1f}' if len(found) > 1 else ''
        return f'{np.mean(found):.1f}{spread}'

    lines = [f'| {" | ".join([corner, *heads])} |', '| --- ' * (len(heads) + 1) + '|']
    lines += [f'| {" | ".join([k, *map(cell, row)])} |' for k, row in values.items()]
    return '\n'.join(lines)


def draw_differences(axis, rows: list[dict]) -> None:
    """Each setting's difference to its baseline with the interval, and its mean."""
    names = []
    for place, row in enumerate(rows):
        baseline = row['setting'] == row['against']
        usual = row['against'] == rows[0]['against']
        name = row['setting']
        name += '' if baseline or usual else f' (to {row["against"]})'
        mean = f'{row["mean"]:.1f}'
        mean += '' if np.isnan(row['std']) else f' ± {row["std"]:.1f}'
        names.append(f'{name}\n{mean}')
        if baseline:
            axis.plot(0, place, 'D', color='grey')
        else:
            wide = np.nan_to_num(row['interval'])
            axis.errorbar(row['difference'], place, xerr=wide, fmt='oC0', capsize=3)
    axis.axvline(0, color='grey', linewidth=0.8)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel('difference in points, 95 % interval')


def draw_curves(axis, curves: dict[str, list[dict]]) -> None:
    """The mean over seeds of each setting's metric by step.

    Args:
        axis: Of matplotlib.
        curves (dict): By setting, for each seed the metric by step.
    """
    for i, (setting, own) in enumerate(curves.items()):
        steps = sorted(set.intersection(*(set(map(int, curve)) for curve in own)))
        means = [np.mean([curve[str(step)] for curve in own]) for step in steps]
        # There are ten colours.
        axis.plot(steps, means, ('-', '--', ':')[i // 10 % 3], label=setting)
    axis.set_xlabel('epoch')
    axis.set_ylabel('top-1 (%), mean over seeds')
    axis.legend(fontsize='small')


def draw_values(axis, heads: list[str], values: dict[str, list]) -> None:
    """Means over seeds as one line per row of :func:`values_table`."""
    for name, row in values.items():
        axis.plot(range(len(heads)), list(map(np.mean, row)), 'o-', label=name)
    axis.set_xticks(range(len(heads)), heads, fontsize=8)
    axis.legend(fontsize=8)
