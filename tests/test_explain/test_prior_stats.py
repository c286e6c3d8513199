import csv
import math

import numpy as np
import pytest

from spvit_mm.explain import PriorMap, format_focus, head_focus, write_focus


def test_numbers_of_known_priors():
    flat = np.ones((3, 5))
    point = np.zeros((3, 5))
    point[2, 3] = 4.0  # one to the right, one down
    (first, second) = head_focus([PriorMap('layer 1', np.stack((flat, point)))])
    mean = np.mean([math.hypot(x, y) for y in (-1, 0, 1) for x in range(-2, 3)])
    assert first.radius == pytest.approx(mean)
    assert first.locality == pytest.approx(0)
    assert first.direction == '-'
    assert second.radius == pytest.approx(math.sqrt(2))
    assert (second.right, second.down) == (1, 1)
    assert second.direction == 'down-right'
    assert (second.low, second.high) == (0, 4)
    difference = math.sqrt(np.square(point - flat).mean())
    assert first.difference == pytest.approx(difference)
    assert second.difference == pytest.approx(difference)


def test_directions_and_locality():
    def focus(x, y):
        table = np.zeros((1, 7, 7))
        table[0, y + 3, x + 3] = 1
        return head_focus([PriorMap('', table)])[0]

    names = [((1, 0), 'right'), ((0, -2), 'up'), ((-3, 3), 'down-left'), ((0, 0), '-')]
    for (x, y), name in names:
        assert focus(x, y).direction == name
    assert focus(0, 0).locality == 1
    assert focus(3, 3).locality < 0
    assert math.isnan(focus(0, 0).difference)
    (single,) = head_focus([PriorMap('', np.ones((1, 1, 1)))])
    assert (single.radius, single.locality) == (0, 0)


def test_masked_offsets_have_no_weight():
    x, y = np.meshgrid(np.arange(-2, 3), np.arange(-1, 2))
    away = 1 - 3 * np.hypot(x, y)
    seen = np.where(x >= 0, away, np.nan)
    flat = np.where(x > 0, -5.0, np.nan)
    first, second, third = head_focus([PriorMap('', np.stack((away, seen, flat)))])
    weight = np.where(x >= 0, away - away.min(), 0)
    weight /= weight.sum()
    assert second.right == pytest.approx((weight * x).sum())
    assert second.radius == pytest.approx((weight * np.hypot(x, y)).sum())
    assert (second.low, second.high) == (first.low, first.high) == (away.min(), 1)
    assert first.direction == '-'
    assert second.direction == 'right'
    # A constant prior is as wide as what is seen of it.
    assert third.right == pytest.approx(1.5)
    assert third.low == third.high == -5
    assert min(f.difference for f in (first, second, third)) > 0.5


def test_table_and_csv(tmp_path):
    rng = np.random.default_rng(0)
    focus = head_focus([PriorMap('layer 1', rng.random((2, 5, 5)))])
    write_focus(tmp_path / 'focus.csv', focus)
    with open(tmp_path / 'focus.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['head'] for row in rows] == ['1', '2']
    assert float(rows[1]['radius']) == pytest.approx(focus[1].radius, rel=1e-5)
    header, *lines = format_focus(focus).splitlines()
    assert len(lines) == 2
    assert header.split() == list(rows[0])
