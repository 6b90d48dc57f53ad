"""Intervals and AUCs: right by other code, and as often as they say."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics import roc as aucs
from ccu_jax.metrics.intervals import (
    Interval,
    clopper_pearson,
    difference_interval,
    effective_sample_size,
    jackknife_interval,
    mean_interval,
    mean_over_seeds,
    proportion_interval,
    quantile_interval,
    variance_of_mean,
)

EXACT = 1e-9


def two_sides(seed=0, shift=0.5, members=60, others=80, ties=False):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=members) + shift, rng.normal(size=others)
    return (np.round(2 * x), np.round(2 * y)) if ties else (x, y)


# --- intervals ------------------------------------------------------------------------


@pytest.mark.parametrize("hits, count", [(0, 1), (1, 1), (0, 20), (3, 20), (700, 700)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_shares_have_the_interval_of_scipy(hits, count, confidence):
    exact = scipy.stats.binomtest(hits, count).proportion_ci(confidence, "exact")
    found = clopper_pearson(hits, count, confidence)
    assert found == pytest.approx((hits / count, exact.low, exact.high), abs=EXACT)


def test_means_have_the_t_interval_and_a_margin_where_values_are_bounded():
    values = np.random.default_rng(0).random(40)
    exact = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    found = mean_interval(values)
    assert found == pytest.approx((values.mean(), *exact), abs=EXACT)
    wider = mean_interval(values, bounds=(0, 1))
    assert found.high < wider.high < found.high + 0.01
    # Five equal answers do not make it certain.
    few = mean_interval(np.ones(5), bounds=(0, 1))
    assert few.value == few.high == 1 and few.low < 0.7
    many = mean_interval(np.ones(5000), bounds=(0, 1))
    assert many.low > 0.999
    assert mean_interval([0.5], bounds=(0, 1)) == (0.5, 0, 1)
    assert mean_interval([0.5]) is mean_interval([]) is None
    assert mean_interval([0.5, np.nan]) is None


def test_the_jackknife_of_a_mean_is_its_t_interval():
    values = np.random.default_rng(0).normal(size=40)
    found = jackknife_interval(lambda x: float(x.mean()), values, parts=40)
    assert found == pytest.approx(mean_interval(values), abs=EXACT)
    fewer = jackknife_interval(lambda x: float(x.mean()), values, parts=10)
    assert 0.5 < (fewer.high - fewer.low) / (found.high - found.low) < 2
    assert jackknife_interval(lambda x: None, values) is None
    assert jackknife_interval(lambda x: float(x.mean()), values[:1]) is None


def test_quantiles_have_an_interval_that_holds_the_truth():
    held = []
    for seed in range(300):
        values = np.random.default_rng(seed).normal(size=80)
        found = quantile_interval(values, 0.9)
        assert found.value == np.quantile(values, 0.9)
        held.append(found.low <= scipy.stats.norm.ppf(0.9) <= found.high)
    assert 0.92 <= np.mean(held) <= 0.995
    few = np.arange(73.0)
    assert quantile_interval(few, 0.95) and not quantile_interval(few[:60], 0.95)
    assert quantile_interval([], 0.5) is quantile_interval([np.nan], 0.5) is None


def test_seeds_that_differ_widen_the_interval_and_those_that_do_not_narrow_it():
    one = Interval(0.6, 0.5, 0.7)
    assert mean_over_seeds([one]) == pytest.approx(one)
    same = mean_over_seeds([one] * 4)
    assert same == pytest.approx((0.6, 0.55, 0.65))
    apart = mean_over_seeds([Interval(x, x - 0.01, x + 0.01) for x in (0.5, 0.6, 0.7)])
    exact = scipy.stats.ttest_1samp([0.5, 0.6, 0.7], 0).confidence_interval()
    assert apart == pytest.approx((0.6, *exact))
    assert mean_over_seeds([one, None]) is mean_over_seeds([]) is None


# --- AUC ------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_every_auc_is_that_of_scikit_learn(seed, ties):
    members, others = two_sides(seed, ties=ties)
    truth = [1] * len(members) + [0] * len(others)
    expected = metrics.roc_auc_score(truth, np.concatenate([members, others]))
    found = aucs.auc_interval(members, others)
    resampled = aucs.auc_bootstrap(members, others, resamples=10)
    assert found.value == pytest.approx(expected, abs=EXACT)
    assert resampled.value == pytest.approx(expected, abs=EXACT)
    for side in aucs.placements(members, others):
        assert side.mean() == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_the_interval_is_delongs_but_for_the_margin(ties):
    members, others = two_sides(ties=ties)
    won = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    exact = won.mean(1).var(ddof=1) / len(members)
    exact += won.mean(0).var(ddof=1) / len(others)
    parts = aucs.placements(members, others)
    assert sum(map(variance_of_mean, parts)) == pytest.approx(exact, abs=EXACT)
    found = aucs.auc_interval(members, others)
    half = 1.959963984540054 * math.sqrt(exact)
    assert 1 < (found.high - found.value) / half < 1.1
    many = aucs.auc_interval(*two_sides(members=4000, others=4000))
    spread = sum(
        map(variance_of_mean, aucs.placements(*two_sides(members=4000, others=4000)))
    )
    assert many.high - many.value == pytest.approx(1.96 * math.sqrt(spread), rel=1e-2)


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_the_bootstrap_is_that_of_resampled_rows(ties):
    members, others = two_sides(ties=ties)
    found = aucs._resampled([(members, others)], 50, seed=3)[0]
    rng = np.random.default_rng(3)
    drawn = [rng.integers(len(x), size=(50, len(x))) for x in (members, others)]
    for value, rows, others_rows in zip(found, *drawn, strict=True):
        parts = aucs.placements(members[rows], others[others_rows])
        assert value == pytest.approx(parts[0].mean(), abs=EXACT)


def test_delong_and_the_bootstrap_agree():
    members, others = two_sides(members=300, others=400)
    one, two = (f(members, others) for f in (aucs.auc_interval, aucs.auc_bootstrap))
    assert one == pytest.approx(two, abs=0.01)
    again = members + 0.3 * two_sides(5, members=300)[0], others
    pair = (members, others, *again)
    model, other = aucs._resampled([pair[:2], pair[2:]], 1000, seed=0)
    drawn = np.quantile(model - other, [0.025, 0.975])
    assert aucs.auc_difference(*pair)[1:] == pytest.approx(drawn, abs=0.01)
    seeds = [aucs.auc_bootstrap(members, others, seed=s) for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_intervals_hold_the_truth_as_often_as_they_say(shift):
    truth = scipy.stats.norm.cdf(shift / math.sqrt(2))
    held = {aucs.auc_interval: [], aucs.auc_bootstrap: []}
    for seed in range(300):
        sides = two_sides(seed, shift, members=40, others=70)
        for interval, hits in held.items():
            more = {"resamples": 200} if interval is aucs.auc_bootstrap else {}
            _, low, high = interval(*sides, **more)
            hits.append(low <= truth <= high)
    assert 0.92 <= np.mean(held[aucs.auc_interval]) <= 0.995
    assert 0.90 <= np.mean(held[aucs.auc_bootstrap]) <= 0.985


def test_the_difference_holds_the_truth_as_often_as_it_says():
    # Two models of equal skill that agree much on the rows.
    held, alone = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rows = [rng.normal(size=n) + shift for n, shift in ((60, 0.5), (90, 0))]
        one, two = ([x + 0.4 * rng.normal(size=len(x)) for x in rows] for _ in "ab")
        found = aucs.auc_difference(*one, *two)
        held.append(found.low <= 0 <= found.high)
        own = aucs.auc_interval(*one)
        alone.append((found.high - found.low) / (own.high - own.low))
    assert 0.92 <= np.mean(held) <= 0.99
    assert np.mean(alone) < 0.75  # narrower than that of either


def test_no_small_sample_makes_certain():
    few = aucs.auc_interval([1, 2, 3], [-1, -2, -3])
    assert few.value == few.high == 1 and few.low < 0.6
    many = aucs.auc_interval(np.arange(1, 1000), -np.arange(1000))
    assert many.low > 0.995
    assert aucs.auc_interval([1.0], [0.0])[1:] == pytest.approx((0, 1))
    same = aucs.auc_difference([1, 2, 3], [1, 2, 0], [1, 2, 3], [1, 2, 0])
    assert same.value == 0 and same.high > 0.3
    identical = aucs.auc_interval(np.zeros(500), np.zeros(300))
    assert identical.value == 0.5 and identical.high - identical.low < 0.02


def test_what_cannot_be_measured_is_none():
    members, others = two_sides()
    bad = np.append(others, np.nan)
    for value in (
        aucs.auc_interval([], others),
        aucs.auc_interval(members, []),
        aucs.auc_interval(members, bad),
        aucs.auc_bootstrap([], others),
        aucs.auc_difference(members, bad, members, bad),
        clopper_pearson(0, 0),
    ):
        assert value is None
    with pytest.raises(ValueError, match="same rows"):
        aucs.auc_difference(members, others, members, others[1:])


def test_the_order_of_rows_changes_nothing():
    members, others = two_sides(ties=True)
    model = members + 1, others
    rng = np.random.default_rng(0)
    a, b = rng.permutation(len(members)), rng.permutation(len(others))
    mixed = members[a], others[b]
    assert aucs.auc_interval(*mixed) == pytest.approx(
        aucs.auc_interval(members, others)
    )
    assert aucs.auc_difference(model[0][a], model[1][b], *mixed) == pytest.approx(
        aucs.auc_difference(*model, members, others)
    )


# --- rows that go together ------------------------------------------------------------


def test_a_share_of_groups_of_unequal_size_holds_the_truth():
    held = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(60), rng.integers(1, 9, size=60))
        found = proportion_interval((rng.random(60) < 0.3)[group], groups=group)
        held.append(found.low <= 0.3 <= found.high)
    assert np.mean(held) >= 0.93
    assert (
        effective_sample_size(np.arange(7)) == 7
        and effective_sample_size([1, 1, 2, 2]) == 2
    )
    assert effective_sample_size([1] * 9 + [2]) == pytest.approx(100 / 82)


def test_values_of_seeds_stay_within_bounds_and_shared_rows_do_not_even_out():
    one = Interval(0.5, 0.4, 0.6)
    assert mean_over_seeds([one] * 4, shared=True) == pytest.approx(one)
    two = [Interval(0.1, 0.0, 0.2), Interval(0.9, 0.8, 1.0)]
    assert mean_over_seeds(two, bounds=(0, 1))[1:] == (0, 1)
    apart = difference_interval(Interval(0.7, 0.6, 0.8), Interval(0.4, 0.3, 0.5))
    assert apart == pytest.approx((0.3, 0.3 - 0.1 * 2**0.5, 0.3 + 0.1 * 2**0.5))


def test_copies_of_rows_tell_no_more_than_the_rows():
    rng = np.random.default_rng(5)
    members, others = two_sides(members=60, others=200)
    reference = [x + rng.normal(size=len(x)) for x in (members, others)]
    sides = [members, others, *reference]
    groups = np.arange(60), np.arange(200)
    copies = [np.repeat(side, 4) for side in sides]
    of = tuple(np.repeat(group, 4) for group in groups)

    def same(measure, *given, **more):
        one = measure(*given, **more)
        grouped = measure(*(np.repeat(x, 4) for x in given), groups=of, **more)
        alone = measure(*(np.repeat(x, 4) for x in given), **more)
        assert grouped == pytest.approx(one, abs=EXACT)
        assert alone.high - alone.low < 0.8 * (one.high - one.low)

    same(aucs.auc_interval, members, others)
    same(aucs.auc_difference, *sides)
    same(aucs.auc_bootstrap, members, others)
    same(lambda *x, **more: attacks.tpr_difference(*x, 0.05, **more), *sides)
    same(lambda *x, **more: attacks.tpr_at_fpr(*x, 0.05, **more), members, others)
    one = mean_interval(members, bounds=(-9, 9))
    assert one == pytest.approx(
        mean_interval(copies[0], bounds=(-9, 9), groups=of[0]), abs=EXACT
    )

    def mean(x):
        return float(x.mean())

    assert jackknife_interval(mean, members) == pytest.approx(
        jackknife_interval(mean, copies[0], groups=of[0]), abs=EXACT
    )


def test_groups_of_any_size_and_name_keep_the_confidence():
    held = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 8, size=50)
        names = np.repeat([f"group {n}" for n in range(50)], sizes)
        values = np.repeat(rng.normal(size=50), sizes) + 0.3 * rng.normal(
            size=len(names)
        )
        found = mean_interval(values, groups=names)
        held.append(found.low <= 0 <= found.high)
    assert 0.91 <= np.mean(held) <= 0.99


@pytest.mark.parametrize("auc", [0.5, 0.65, 0.76])
def test_models_that_are_as_good_are_seldom_found_to_differ_at_few_false_alarms(auc):
    shift, wrong = math.sqrt(2) * scipy.stats.norm.ppf(auc), 0
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        both = [rng.normal(m, 0.7, size=200) for m in (shift, 0)] * 2
        both = [x + rng.normal(0, 0.7, size=200) for x in both]
        found = attacks.tpr_difference(*both, 0.01, resamples=200)
        wrong += not found.low <= 0 <= found.high
    assert wrong / 200 <= 0.05
