import numpy as np
import pytest
from comparison import compare, comparison_table, holm, values_table
from scipy import stats


def naive_holm(p_values):
    """Reject from the smallest on, at alpha / (number of those not yet rejected)."""
    adjusted = []
    for p in p_values:
        smaller = sorted(x for x in p_values if x <= p)
        levels = [(len(p_values) - i) * x for i, x in enumerate(smaller)]
        adjusted.append(min(1.0, max(levels)))
    return adjusted


@pytest.mark.parametrize(
    'p_values', [[0.01, 0.04, 0.03, 0.005], [0.5, 0.9], [0.2], [0.0, 0.6, 0.01, 0.011]]
)
def test_holm_follows_its_definition(p_values):
    np.testing.assert_allclose(holm(p_values), naive_holm(p_values), rtol=1e-12)


def test_holm_counts_comparisons_only():
    np.testing.assert_array_equal(holm([np.nan, 0.01, 0.02]), [np.nan, 0.02, 0.02])


def test_compare_is_paired_by_seed():
    values = {'a': [90.0, 92.0, 91.0], 'b': [91.0, 94.0, 91.5], 'c': [90.5, 92.1, 90.0]}
    rows = compare(values, dict.fromkeys(values, 'a'))
    assert [row['setting'] for row in rows] == ['a', 'b', 'c']
    for row in rows[1:]:
        differences = np.subtract(values[row['setting']], values['a'])
        low, high = stats.t.interval(
            0.95, 2, differences.mean(), stats.sem(differences)
        )
        assert row['difference'] == pytest.approx(differences.mean())
        assert row['interval'] == pytest.approx((high - low) / 2)
        test = stats.ttest_rel(values[row['setting']], values['a'])
        assert row['p'] == pytest.approx(test.pvalue)
    smaller, larger = sorted(row['p'] for row in rows[1:])
    assert {row['p_holm'] for row in rows[1:]} == {
        2 * smaller,
        max(2 * smaller, larger),
    }
    assert np.isnan(rows[0]['p'])
    assert '| b | 92.17 | 1.61 | +1.17 | a |' in comparison_table(rows)


def test_each_setting_has_its_own_baseline():
    values = {'a': [1.0, 2.0], 'b': [3.0, 5.0]}
    rows = compare(values, {'a': 'b', 'b': 'b'})
    assert [row['difference'] for row in rows] == [-2.5, 0.0]


def test_few_or_equal_seeds():
    (one, _) = rows = compare({'a': [1.0], 'b': [2.0]}, {'a': 'b', 'b': 'b'})
    assert '| a | 1.00 |  | -1.00 | b | one seed |  |' in comparison_table(rows)
    assert np.isnan([one['std'], one['interval'], one['p'], one['p_holm']]).all()
    shifted = compare({'a': [1.0, 3.0], 'b': [2.0, 4.0]}, {'a': 'b', 'b': 'b'})[0]
    assert (shifted['interval'], shifted['p']) == (0, 0)
    equal = compare({'a': [1.0, 3.0], 'b': [1.0, 3.0]}, {'a': 'b', 'b': 'b'})[0]
    assert (equal['difference'], equal['p']) == (0, 1)


def test_values_table():
    text = values_table(['24x24', '48x48'], {'raw': [[90.0, 92.0], [1.0]]}, 'prior')
    assert text.splitlines()[0] == '| prior | 24x24 | 48x48 |'
    assert text.splitlines()[2] == '| raw | 91.0 ± 1.4 | 1.0 |'
