"""Lower bounds of epsilon, and scores of pools: published values, and what they see."""

import math

import numpy as np
import pytest
import scipy.stats

from ccu_jax.metrics import forgetting
from ccu_jax.metrics import privacy as epsilon
from ccu_jax.metrics.intervals import clopper_pearson

# --- one run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct, guesses, canaries, delta, confidence, expected, near",
    [
        # Steinke et al. 2023 (arXiv 2305.08846v1), appendix D: 75 right of 100.
        (75, 100, 100, 1e-4, 0.95, 0.699, 1e-3),
        (75, 100, 1000, 1e-4, 0.95, 0.673, 1e-3),
        # The same, section 7 (figure 11).
        (1439, 1510, 100_000, 1e-5, 0.95, 2.675, 1e-3),
        # What `_epsilon_one_run` of jax-privacy 2.0.0 (auditing.py) gives.
        (75, 100, 100, 1e-4, 0.95, 0.6994669106, 1e-6),
        (75, 100, 1000, 1e-4, 0.95, 0.6729847298, 1e-6),
        (1439, 1510, 100_000, 1e-5, 0.95, 2.6758509126, 1e-6),
        (100, 100, 1000, 1e-5, 0.95, 3.4653762294, 1e-6),
        (45, 50, 200, 0, 0.9, 1.5325689568, 1e-6),
        (520, 1000, 1000, 1e-5, 0.95, 0, 0),
        (400, 500, 1000, 1e-3, 0.99, 0, 0),
    ],
)
def test_one_run_bounds_are_the_published_ones(
    correct, guesses, canaries, delta, confidence, expected, near
):
    found = epsilon.one_run_epsilon(correct, guesses, canaries, delta, confidence)
    assert found == pytest.approx(expected, abs=near)


@pytest.mark.parametrize(
    "given, expected",
    [
        # `_one_run_p_value` of jax-privacy 2.0.0: correct, guesses, canaries, delta.
        ((75, 100, 100, 1e-4), 0.005782986302030884),
        ((1439, 1510, 100_000, 1e-5), 0.0036509762898014634),
        ((400, 500, 1000, 1e-3), 0.017894996784762026),
        ((45, 50, 200, 0), 1.0657302580764257e-05),
    ],
)
def test_one_run_p_values_are_those_of_jax_privacy(given, expected):
    correct, guesses, canaries, delta = given
    found = epsilon.one_run_p_value(correct, guesses, canaries, 0.5, delta)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "correct, guesses, thresholds, expected",
    [
        (2807, 3376, 386, 1.13346),
        (4499, 4666, 374, 2.311945),
        (8223, 8233, 140, 4.39557),
    ],
)
def test_one_run_bounds_of_normal_scores_are_those_of_jax_privacys_tests(
    correct, guesses, thresholds, expected
):
    # tests/auditing_test.py of jax-privacy 2.0.0, test_epsilon_one_run_close: normal
    # scores of 10,000 canaries each, 1, 2 and 4 apart, delta 1e-6. The guesses are
    # those of the threshold it takes, of so many thresholds that share the confidence.
    level = 1 - 0.05 / thresholds
    found = epsilon.one_run_epsilon(correct, guesses, 20_000, 1e-6, level)
    assert found == pytest.approx(expected, rel=2e-6)


def canaries(seed, count=1000, effect=0.0):
    rng = np.random.default_rng(seed)
    included = rng.random(count) < 0.5
    return rng.normal(size=count) + effect * included, included


def test_the_one_run_audit_sees_memory_and_over_forgetting():
    none, some, much = (
        epsilon.one_run_audit(*canaries(0, effect=e)) for e in (0, 1, 3)
    )
    assert none.epsilon == 0 and 0 < some.epsilon < much.epsilon
    assert not much.over_forgotten and much.canaries == 1000
    scores, included = canaries(0, effect=3)
    over = epsilon.one_run_audit(-scores, included)
    assert over.over_forgotten and over.epsilon == pytest.approx(much.epsilon)
    # What was found is what its numbers give.
    level = 1 - 0.05 / much.tried
    again = epsilon.one_run_epsilon(much.correct, much.guesses, 1000, 1e-5, level)
    assert again == much.epsilon


def test_the_one_run_audit_is_seldom_wrong_where_nothing_leaks():
    wrong = [epsilon.one_run_audit(*canaries(s, 200)).epsilon > 0 for s in range(200)]
    assert np.mean(wrong) <= 0.05


def test_equal_scores_tell_nothing_however_rows_are_ordered():
    included = np.arange(1000) < 500  # members first
    assert epsilon.one_run_audit(np.zeros(1000), included).epsilon == 0
    assert epsilon.one_run_audit(np.zeros(1), included[:1]).epsilon == 0
    scores, included = canaries(0, effect=1)
    order = np.random.default_rng(1).permutation(1000)
    one = epsilon.one_run_audit(scores, included)
    assert epsilon.one_run_audit(scores[order], included[order]) == one
    with pytest.raises(ValueError, match="no number"):
        epsilon.one_run_audit([np.nan], [True])
    with pytest.raises(ValueError, match="correct"):
        epsilon.one_run_epsilon(5, 4, 10)


# --- thresholds -----------------------------------------------------------------------


def test_the_clopper_pearson_bound_is_that_of_its_rates():
    fnr, fpr = (clopper_pearson(hits, 1000).high for hits in (309, 308))
    expected = max(math.log((1 - 1e-5 - fpr) / fnr), math.log((1 - 1e-5 - fnr) / fpr))
    found = epsilon.clopper_pearson_epsilon(691, 1000, 308, 1000)
    assert found == pytest.approx(expected)
    # `epsilon_clopper_pearson` of jax-privacy 2.0.0 for 1,000 normal scores each, one
    # apart, at the threshold in the middle, two-sided.
    both = scipy.stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    hits = int((both + 1 >= 0.5).sum()), int((both >= 0.5).sum())
    found = epsilon.clopper_pearson_epsilon(hits[0], 1000, hits[1], 1000)
    assert found == pytest.approx(0.6692057411, abs=1e-6)
    assert epsilon.clopper_pearson_epsilon(500, 1000, 500, 1000) == 0
    assert epsilon.clopper_pearson_epsilon(0, 1, 0, 1) == 0


def test_the_threshold_bound_sees_either_side_and_not_what_is_not_there():
    rng = np.random.default_rng(0)
    members, others = rng.normal(size=(2, 1000))
    assert epsilon.threshold_epsilon(members + 2, others) > 1
    assert epsilon.threshold_epsilon(members - 2, others) > 1
    few = members.copy()
    few[:100] += 9  # a tenth, remembered beyond doubt
    assert epsilon.threshold_epsilon(few, others) > 0.5
    assert epsilon.threshold_epsilon([1.0], others) is None
    assert epsilon.threshold_epsilon(members * np.nan, others) is None
    assert epsilon.threshold_epsilon(np.zeros(50), np.zeros(50)) == 0
    mixed = rng.permutation(few), rng.permutation(others)
    same = epsilon.threshold_epsilon(few, others)
    assert epsilon.threshold_epsilon(*mixed) == same
    wrong = []
    for seed in range(200):
        sides = np.random.default_rng(seed).normal(size=(2, 100))
        wrong.append(epsilon.threshold_epsilon(*sides) > 0)
    assert np.mean(wrong) <= 0.05


def test_rows_of_a_group_do_not_refute_more_than_one_of_them():
    wrong = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(40), 10)
        sides = [
            rng.normal(size=40)[group] + 0.1 * rng.normal(size=400) for _ in range(2)
        ]
        wrong.append(epsilon.threshold_epsilon(*sides, groups=(group, group)) > 0)
    assert np.mean(wrong) <= 0.05
    mixed = rng.permutation(400)
    again = [side[mixed] for side in sides]
    assert epsilon.threshold_epsilon(
        *again, groups=(group[mixed], group[mixed])
    ) == epsilon.threshold_epsilon(*sides, groups=(group, group))


def test_pools_of_no_numbers_have_no_score_and_bad_counts_are_refused():
    pool = np.random.default_rng(0).normal(size=(4, 30))
    bad = np.full_like(pool, np.nan)
    assert forgetting.forgetting_score(bad, pool, pool).score is None
    assert forgetting.klom(pool, pool, bad).control is None
    assert forgetting.klom(pool, bad, pool, quantile=0.9).score is None
    assert forgetting.final_score(0.5, (np.nan, 0.5), (0.5, 0.5)) is None
    for given in (([], []), ([1.0, 2.0], [True, False])):
        with pytest.raises(ValueError, match="canaries"):
            epsilon.one_run_audit(*given, guesses=[9])
    with pytest.raises(ValueError, match="members and others"):
        epsilon.clopper_pearson_epsilon(0, 0, 0, 10)


# --- pools ----------------------------------------------------------------------------


def test_forgetting_epsilons_have_the_values_computed_by_hand():
    ln = math.log
    # Unlearned 1 2 3 4 above retrained 0 1.5 2.5 -1: between 1.5 and 2 both kinds have
    # one on the wrong side; between 2.5 and 3 FNR is 2 / 4, and FPR 0 does not count.
    unlearned = np.array([[1, 2, 3, 4]], float).T
    retrained = np.array([[0, 1.5, 2.5, -1]], float).T
    found = forgetting.epsilon_by_row(unlearned, retrained, delta=0)
    assert found == pytest.approx([ln((1 - 0.25) / 0.25)])
    with_delta = forgetting.epsilon_by_row(unlearned, retrained, delta=1e-2)
    assert with_delta == pytest.approx([ln((1 - 0.01 - 0.25) / 0.25)])
    # Which of both is the higher one does not matter.
    swapped = forgetting.epsilon_by_row(retrained, unlearned, delta=0)
    assert swapped == pytest.approx(found)
    apart = forgetting.epsilon_by_row(unlearned + 9, retrained)
    peaky = forgetting.epsilon_by_row(0.001 * unlearned, retrained)
    same = forgetting.epsilon_by_row(0 * unlearned, 0 * retrained)
    assert (*apart, *peaky, *same) == (50, 50, 0)


def test_points_halve_with_each_half_of_epsilon():
    given = [0, 0.49, 0.5, 1.2, 2.99, 3.0, 50]
    found = forgetting.forgetting_points_by_row(
        given, models=17
    )  # ln 16 = 2.77: up to 3
    np.testing.assert_allclose(found, [1, 1, 0.5, 0.25, 1 / 32, 0, 0])


@pytest.mark.parametrize(
    "models, same, shifted", [(16, 0.32, 0.114), (128, 0.34, 0.031), (512, 0.36, 0.016)]
)
def test_the_forgetting_score_is_far_from_one_even_for_the_control(
    models, same, shifted
):
    # Values measured before, by other code, on 1,000 rows.
    unlearned, retrained, control = np.random.default_rng(0).normal(
        size=(3, models, 300)
    )
    found = forgetting.forgetting_score(unlearned + 1, retrained, control)
    assert found.models == models
    assert found.control.low - 0.02 < same < found.control.high + 0.02
    assert found.score.value == pytest.approx(shifted, abs=0.015)
    good = forgetting.forgetting_score(unlearned, retrained, control)
    assert good.score.low < good.control.high and good.control.low < good.score.high


def test_pools_must_be_of_one_size_and_are_finite_at_the_edges():
    pools = np.random.default_rng(0).normal(size=(3, 4, 10))
    with pytest.raises(ValueError, match="as many models"):
        forgetting.forgetting_score(pools[0], pools[1], pools[2][:3])
    with pytest.raises(ValueError, match="2 models a side"):
        forgetting.forgetting_score(*pools[:, :2])
    with pytest.raises(ValueError, match="as many models"):
        forgetting.klom(pools[0], pools[1][:3], pools[2])
    for given in (1e6 * pools, 0 * pools, pools[:, :, :1]):
        for score in (forgetting.forgetting_score, forgetting.klom):
            found = score(*given)
            if given.shape[2] == 1 and score is forgetting.klom:
                assert found.score is None  # of one row, without bounds
            else:
                assert np.isfinite([*found.score, *found.control]).all()
    order = np.random.default_rng(1).permutation(10)
    for by_row in (forgetting.epsilon_by_row, forgetting.klom_by_row):
        found = by_row(pools[0], pools[1])
        mixed = by_row(pools[0][::-1][:, order], pools[1][:, order])
        np.testing.assert_allclose(found[order], mixed)
    assert forgetting.final_score(0.4, (0.9, 1.0), (0.6, 0.8)) == pytest.approx(0.27)
    assert forgetting.final_score(0.4, (0.9, 0.0), (0.6, 0.8)) is None


def test_klom_has_the_value_computed_by_hand():
    # Two bins: of unlearned 3 and 1, of retrained 1 and 3.
    unlearned = np.array([[0, 0.1, 0.2, 1]]).T
    retrained = np.array([[0, 0.9, 0.8, 0.7]]).T
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    found = forgetting.klom_by_row(unlearned, retrained, bins=2)
    assert found == pytest.approx([expected])
    # Nothing in common: all of it against the least share.
    found = forgetting.klom_by_row(unlearned, retrained + 90)
    assert found[0] > 5
    assert forgetting.klom_by_row(unlearned, unlearned) == pytest.approx([0])
    # Clipped: 200 and 300 are the same margin.
    far = forgetting.klom_by_row(0 * unlearned + 200, 0 * unlearned + 300)
    assert far == pytest.approx([0])


def test_klom_sees_a_shift_and_its_control_does_not():
    unlearned, retrained, control = np.random.default_rng(0).normal(size=(3, 100, 300))
    good = forgetting.klom(unlearned, retrained, control)
    assert good.score.low < good.control.high and good.control.low < good.score.high
    bad = forgetting.klom(unlearned + 1, retrained, control)
    assert bad.score.low > 1.5 * bad.control.high
    # A tenth of the rows shifted: the upper quantile sees it best.
    few = unlearned.copy()
    few[:, :30] += 3
    high = forgetting.klom(few, retrained, control, quantile=0.95)
    assert high.score.low > 3 * high.control.high
