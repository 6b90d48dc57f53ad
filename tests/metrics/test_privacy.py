"""Lower bounds of epsilon agree with published values and with jax-privacy."""

import math

import numpy as np
import pytest
import scipy.stats

from ccu_jax.metrics.intervals import clopper_pearson
from ccu_jax.metrics.privacy import (
    clopper_pearson_epsilon,
    one_run_audit,
    one_run_epsilon,
    threshold_epsilon,
)
from ccu_jax.metrics.roc import Signals
from tests.metrics.samples import require


@pytest.mark.parametrize(
    "correct, guesses, canaries, delta, confidence, expected, tolerance",
    [
        # `_epsilon_one_run` of jax-privacy 2.0.0 (auditing.py). The first three are
        # 0.699, 0.673 and 2.675 in appendix D and section 7 (figure 11) of Steinke et
        # al. 2023 (arXiv 2305.08846v1).
        (75, 100, 100, 1e-4, 0.95, 0.6994669106, 1e-6),
        (75, 100, 1000, 1e-4, 0.95, 0.6729847298, 1e-6),
        (1439, 1510, 100_000, 1e-5, 0.95, 2.6758509126, 1e-6),
        (100, 100, 1000, 1e-5, 0.95, 3.4653762294, 1e-6),
        (45, 50, 200, 0, 0.9, 1.5325689568, 1e-6),
        (520, 1000, 1000, 1e-5, 0.95, 0, 0),
        (400, 500, 1000, 1e-3, 0.99, 0, 0),
        # jax-privacy 2.0.0, tests/auditing_test.py, test_epsilon_one_run_close: normal
        # scores of 10,000 canaries each, 1, 2 and 4 apart. The guesses are those of the
        # threshold it chooses among 386, 374 and 140, which share the confidence.
        (2807, 3376, 20_000, 1e-6, 1 - 0.05 / 386, 1.13346, 3e-6),
        (4499, 4666, 20_000, 1e-6, 1 - 0.05 / 374, 2.311945, 5e-6),
        (8223, 8233, 20_000, 1e-6, 1 - 0.05 / 140, 4.39557, 9e-6),
    ],
)
def test_one_run_epsilon_has_the_published_values(
    correct, guesses, canaries, delta, confidence, expected, tolerance
):
    epsilon = one_run_epsilon(correct, guesses, canaries, delta, confidence)
    assert epsilon == pytest.approx(expected, abs=tolerance)


def canaries(seed_or_rng, count=1000, effect=0.0):
    rng = np.random.default_rng(seed_or_rng)
    included = rng.random(count) < 0.5
    return rng.normal(size=count) + effect * included, included


def test_one_run_audit_finds_memory_and_over_forgetting():
    none, some, much = (one_run_audit(*canaries(0, effect=x)) for x in (0, 1, 3))
    assert none.epsilon == 0 and 0 < some.epsilon < much.epsilon
    assert not much.over_forgotten and much.canaries == 1000
    scores, included = canaries(0, effect=3)
    over = one_run_audit(-scores, included)
    assert over.over_forgotten and over.epsilon == pytest.approx(much.epsilon)
    # The bound is that of the stated numbers.
    confidence = 1 - 0.05 / much.tried
    epsilon = one_run_epsilon(much.correct, much.guesses, 1000, 1e-5, confidence)
    assert epsilon == much.epsilon
    # It does not depend on the order of the rows.
    order = np.random.default_rng(1).permutation(1000)
    assert one_run_audit(-scores[order], included[order]) == over
    members_first = np.arange(1000) < 500
    assert one_run_audit(np.zeros(1000), members_first).epsilon == 0
    assert one_run_audit(np.zeros(1), [True]).epsilon == 0


def test_impossible_counts_are_rejected():
    for scores in ([np.nan], []):
        with pytest.raises(ValueError, match="non-empty and finite"):
            one_run_audit(scores, [True] * len(scores))
    with pytest.raises(ValueError, match="correct"):
        one_run_epsilon(5, 4, 10)
    with pytest.raises(ValueError, match="counts must be positive"):
        clopper_pearson_epsilon(0, 0, 0, 10)


def test_clopper_pearson_epsilon_uses_the_upper_limits_of_both_rates():
    fnr, fpr = (require(clopper_pearson(hits, 1000)).high for hits in (309, 308))
    expected = max(math.log((1 - 1e-5 - fpr) / fnr), math.log((1 - 1e-5 - fnr) / fpr))
    epsilon = clopper_pearson_epsilon(691, 1000, 308, 1000)
    assert epsilon == pytest.approx(expected)
    # `epsilon_clopper_pearson` of jax-privacy 2.0.0 for 1,000 normal scores each, one
    # apart, at the threshold in the middle, two-sided.
    scores = scipy.stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    hits = int((scores + 1 >= 0.5).sum()), int((scores >= 0.5).sum())
    epsilon = clopper_pearson_epsilon(hits[0], 1000, hits[1], 1000)
    assert epsilon == pytest.approx(0.6692057411, abs=1e-6)
    assert clopper_pearson_epsilon(500, 1000, 500, 1000) == 0
    assert clopper_pearson_epsilon(0, 1, 0, 1) == 0


def test_threshold_epsilon_finds_members_on_either_side():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(size=(2, 1000))
    few = members.copy()
    few[:100] += 9
    for side, minimum in ((members + 2, 1), (members - 2, 1), (few, 0.5)):
        assert require(threshold_epsilon(Signals(side, nonmembers))) > minimum
    mixed = Signals(rng.permutation(few), rng.permutation(nonmembers))
    assert threshold_epsilon(mixed) == threshold_epsilon(Signals(few, nonmembers))
    assert threshold_epsilon(Signals(np.zeros(50), np.zeros(50))) == 0
    for side in (np.ones(1), members * np.nan):
        assert threshold_epsilon(Signals(side, nonmembers)) is None


def sample_canaries(rng):
    return one_run_audit(*canaries(rng, 200)).epsilon


def sample_rows(rng):
    return threshold_epsilon(Signals(*rng.normal(size=(2, 100))))


def sample_groups(rng):
    groups = np.repeat(np.arange(40), 10)
    members, nonmembers = (
        rng.normal(size=40)[groups] + 0.1 * rng.normal(size=400) for _ in "mn"
    )
    epsilon = threshold_epsilon(Signals(members, nonmembers, (groups, groups)))
    order = rng.permutation(400)
    mixed = Signals(members[order], nonmembers[order], (groups[order],) * 2)
    assert threshold_epsilon(mixed) == epsilon
    return epsilon


@pytest.mark.parametrize("sample", [sample_canaries, sample_rows, sample_groups])
def test_bound_is_rarely_above_zero_if_nothing_leaks(sample):
    rngs = map(np.random.default_rng, range(200))
    assert np.mean([require(sample(rng)) > 0 for rng in rngs]) <= 0.05
