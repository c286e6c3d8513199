import numpy as np
import pytest
from comparison import compare, comparison_table, holm, seed_deviation, values_table
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


def test_a_pooled_deviation_is_that_of_an_analysis_of_variance():
    top1 = np.array([[90.0, 92.0, 91.0], [91.0, 94.0, 91.5], [90.5, 92.1, 90.0]])
    rest = top1 - top1.mean(0) - top1.mean(1, keepdims=True) + top1.mean()
    deviation, freedom = seed_deviation(dict(zip('abc', top1.tolist(), strict=True)))
    assert freedom == 4
    assert deviation == pytest.approx(np.sqrt((rest**2).sum() / 4))


def test_pooled_intervals_do_not_trust_two_seeds_that_agree():
    values = {'a': [90.0, 91.0], 'b': [93.0, 94.0], 'c': [91.0, 93.0], 'd': [95.0]}
    rows = {x['setting']: x for x in compare(values, dict.fromkeys(values, 'a'), True)}
    deviation, freedom = seed_deviation(values)
    assert freedom == 2
    wide = stats.t.ppf(0.975, 2) * deviation
    assert rows['b']['interval'] == rows['c']['interval'] == pytest.approx(wide)
    # One seed has an interval, too, and a wider one.
    assert rows['d']['interval'] == pytest.approx(wide * np.sqrt(2))
    t = rows['d']['difference'] / deviation / np.sqrt(2)
    assert rows['d']['p'] == pytest.approx(2 * stats.t.sf(t, 2))
    assert rows['a']['interval'] == 0
    assert np.isnan(rows['a']['p'])


def test_pooling_needs_two_settings_with_two_seeds():
    rows = compare({'a': [1.0, 2.0], 'b': [3.0]}, {'a': 'a', 'b': 'a'}, pooled=True)
    assert np.isnan([row['interval'] for row in rows]).all()


def test_values_table():
    text = values_table(['24x24', '48x48'], {'raw': [[90.0, 92.0], [1.0]]}, 'prior')
    assert text.splitlines()[0] == '| prior | 24x24 | 48x48 |'
    assert text.splitlines()[2] == '| raw | 91.0 ± 1.4 | 1.0 |'
