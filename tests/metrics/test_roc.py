"""AUCs agree with other code, and their intervals have their nominal coverage."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from ccu_jax.metrics import membership, roc
from ccu_jax.metrics.intervals import variance_of_mean
from ccu_jax.metrics.roc import Signals, auc_bootstrap, auc_difference, auc_interval
from tests.metrics.samples import measured, normal_signals

EXACT = 1e-9
TIES = pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])


@TIES
@pytest.mark.parametrize("seed", range(3))
def test_every_auc_agrees_with_scikit_learn(seed, ties):
    signals = normal_signals(seed, ties=ties)
    truth = [1] * len(signals.members) + [0] * len(signals.nonmembers)
    expected = metrics.roc_auc_score(truth, np.concatenate(signals[:2]))
    for interval in (auc_interval(signals), auc_bootstrap(signals)):
        assert measured(interval).value == pytest.approx(expected, abs=EXACT)
    for side in roc.placements(*signals[:2]):
        assert side.mean() == pytest.approx(expected, abs=EXACT)


@TIES
def test_interval_is_delongs_with_two_extra_values(ties):
    signals = normal_signals(ties=ties)
    wins = signals.members[:, None] > signals.nonmembers
    wins = wins + 0.5 * (signals.members[:, None] == signals.nonmembers)
    exact = wins.mean(1).var(ddof=1) / len(signals.members)
    exact += wins.mean(0).var(ddof=1) / len(signals.nonmembers)
    placed = roc.placements(*signals[:2])
    assert sum(map(variance_of_mean, placed)) == pytest.approx(exact, abs=EXACT)
    interval = measured(auc_interval(signals))
    half_width = 1.959963984540054 * math.sqrt(exact)
    assert 1 < (interval.high - interval.value) / half_width < 1.1
    # With many rows the extra values do not matter.
    signals = normal_signals(members=4000, nonmembers=4000)
    interval = measured(auc_interval(signals))
    variance = sum(map(variance_of_mean, roc.placements(*signals[:2])))
    half_width = 1.96 * math.sqrt(variance)
    assert interval.high - interval.value == pytest.approx(half_width, rel=1e-2)


@TIES
def test_bootstrap_is_the_auc_of_resampled_rows(ties):
    signals = normal_signals(ties=ties)
    samples = roc._resample_auc(signals, 50)
    rng = np.random.default_rng(0)
    rows = [rng.integers(len(x), size=(50, len(x))) for x in signals[:2]]
    for value, m, n in zip(samples, *rows, strict=True):
        placed = roc.placements(signals.members[m], signals.nonmembers[n])
        assert value == pytest.approx(placed[0].mean(), abs=EXACT)


def test_delong_and_bootstrap_agree():
    model = normal_signals(members=300, nonmembers=400)
    assert auc_interval(model) == pytest.approx(auc_bootstrap(model), abs=0.01)
    noise = 0.3 * normal_signals(5, members=300).members
    reference = Signals(model.members + noise, model.nonmembers)
    samples = [roc._resample_auc(x, 1000) for x in (model, reference)]
    limits = np.quantile(samples[0] - samples[1], [0.025, 0.975])
    difference = measured(auc_difference(model, reference))
    assert difference[1:] == pytest.approx(limits, abs=0.01)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_intervals_have_their_coverage(shift, monkeypatch):
    monkeypatch.setattr(roc, "_NUM_RESAMPLES", 200)
    truth = scipy.stats.norm.cdf(shift / math.sqrt(2))
    covered = {auc_interval: [], auc_bootstrap: []}
    for seed in range(300):
        signals = normal_signals(seed, shift, members=40, nonmembers=70)
        for interval, of_seeds in covered.items():
            _, low, high = measured(interval(signals))
            of_seeds.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered[auc_interval]) <= 0.995
    assert 0.90 <= np.mean(covered[auc_bootstrap]) <= 0.985


def test_paired_difference_has_its_coverage_and_is_narrower_than_either_auc():
    covered, ratios = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        # Two equally good models that agree on most rows.
        rows = [rng.normal(size=n) + shift for n, shift in ((60, 0.5), (90, 0))]
        one, two = (
            Signals(*(x + 0.4 * rng.normal(size=len(x)) for x in rows)) for _ in "ab"
        )
        paired, alone = measured(auc_difference(one, two)), measured(auc_interval(one))
        covered.append(paired.low <= 0 <= paired.high)
        ratios.append((paired.high - paired.low) / (alone.high - alone.low))
    assert 0.92 <= np.mean(covered) <= 0.99
    assert np.mean(ratios) < 0.75


def test_intervals_of_small_samples_have_a_width():
    few = Signals(np.array([1, 2, 3]), np.array([-1, -2, -3]))
    interval = measured(auc_interval(few))
    assert interval.value == interval.high == 1 and interval.low < 0.6
    many = Signals(np.arange(1, 1000), -np.arange(1000))
    assert measured(auc_interval(many)).low > 0.995
    one = Signals(np.ones(1), np.zeros(1))
    assert measured(auc_interval(one))[1:] == pytest.approx((0, 1))
    same = Signals(np.array([1, 2, 3]), np.array([1, 2, 0]))
    difference = measured(auc_difference(same, same))
    assert difference.value == 0 and difference.high > 0.3
    tied = measured(auc_interval(Signals(np.zeros(500), np.zeros(300))))
    assert tied.value == 0.5 and tied.high - tied.low < 0.02


def test_what_cannot_be_measured_is_none():
    members, nonmembers, _ = normal_signals()
    for signals in (
        Signals(members[:0], nonmembers),
        Signals(members, nonmembers[:0]),
        Signals(members, np.append(nonmembers, np.nan)),
    ):
        assert auc_interval(signals) is auc_bootstrap(signals) is None
        assert auc_difference(signals, signals) is None
    with pytest.raises(ValueError, match="same rows"):
        auc_difference(Signals(members, nonmembers), Signals(members, nonmembers[1:]))


@pytest.mark.parametrize(
    "measure",
    [
        auc_interval,
        auc_bootstrap,
        auc_difference,
        lambda *x: membership.tpr_at_fpr(*x, 0.05),
        lambda *x: membership.tpr_difference(*x, 0.05),
    ],
    ids=["auc", "bootstrap", "auc difference", "tpr", "tpr difference"],
)
def test_copies_of_rows_in_groups_do_not_narrow_an_interval(measure, request):
    rng = np.random.default_rng(5)
    model = normal_signals(members=60, nonmembers=200)
    reference = Signals(*(x + rng.normal(size=len(x)) for x in model[:2]))
    models = (model, reference) if "diff" in request.node.name else (model,)
    groups = np.repeat(np.arange(60), 4), np.repeat(np.arange(200), 4)
    copies = [[np.repeat(x, 4) for x in signals[:2]] for signals in models]
    one = measure(*models)
    grouped = measure(*(Signals(*x, groups) for x in copies))
    assert grouped == pytest.approx(one, abs=EXACT)
    ungrouped = measure(*(Signals(*x) for x in copies))
    assert ungrouped.high - ungrouped.low < 0.8 * (one.high - one.low)
