"""AUCs and attack rates agree with other code; intervals have their coverage."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from ccu_jax.metrics import classification, roc
from ccu_jax.metrics.intervals import clopper_pearson, variance_of_mean
from ccu_jax.metrics.roc import Signals
from tests.metrics.samples import EXACT, TIES, compute_coverage, make_signals, require


@TIES
@pytest.mark.parametrize("seed", range(3))
def test_every_auc_agrees_with_scikit_learn(seed, ties):
    signals = members, nonmembers, _ = make_signals(seed, ties=ties)
    truth = [1] * len(members) + [0] * len(nonmembers)
    auc = metrics.roc_auc_score(truth, np.concatenate([members, nonmembers]))
    expected = pytest.approx(auc, abs=EXACT)
    for interval in (roc.auc_interval(signals), roc.auc_bootstrap(signals)):
        assert require(interval).value == expected
    assert [x.mean() for x in roc.placements(members, nonmembers)] == [expected] * 2
    assert classification.auc(members, nonmembers) == expected
    assert 1 - classification.auc(nonmembers, members) == expected


@TIES
def test_interval_is_delongs_with_two_extra_values(ties):
    signals = make_signals(ties=ties)
    wins = signals.members[:, None] > signals.nonmembers
    wins = wins + 0.5 * (signals.members[:, None] == signals.nonmembers)
    exact = wins.mean(1).var(ddof=1) / len(signals.members)
    exact += wins.mean(0).var(ddof=1) / len(signals.nonmembers)
    variance = sum(map(variance_of_mean, roc.placements(*signals[:2])))
    assert variance == pytest.approx(exact, abs=EXACT)
    interval = require(roc.auc_interval(signals))
    half_width = 1.959963984540054 * math.sqrt(exact)
    assert 1 < (interval.high - interval.value) / half_width < 1.1


@TIES
def test_bootstrap_is_the_auc_of_resampled_rows(ties):
    signals = make_signals(ties=ties)
    rng = np.random.default_rng(0)
    rows = [rng.integers(len(x), size=(50, len(x))) for x in signals[:2]]
    sides = (x[r] for x, r in zip(signals[:2], rows, strict=True))
    aucs = list(map(classification.auc, *sides))
    np.testing.assert_allclose(roc._auc_of_samples(signals, 50), aucs, atol=EXACT)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_intervals_have_their_coverage(shift, monkeypatch):
    monkeypatch.setattr(roc, "_NUM_RESAMPLES", 200)
    truth = scipy.stats.norm.cdf(shift / math.sqrt(2))

    def sample(rng):
        return Signals(rng.normal(shift, size=40), rng.normal(size=70))

    exact = compute_coverage(lambda rng: roc.auc_interval(sample(rng)), truth)
    bootstrap = compute_coverage(lambda rng: roc.auc_bootstrap(sample(rng)), truth)
    assert 0.92 <= exact <= 0.995 and 0.90 <= bootstrap <= 0.985


def similar_models(rng, shift, noise, rows=(60, 90)):
    """Returns signals of two equally good models that agree on most rows."""
    sides = rng.normal(shift, size=rows[0]), rng.normal(size=rows[1])
    return [
        Signals(*(x + noise * rng.normal(size=len(x)) for x in sides)) for _ in "ab"
    ]


def test_paired_difference_has_its_coverage_and_is_narrower_than_either_auc():
    ratios = []

    def sample(rng):
        model, reference = similar_models(rng, 0.5, 0.4)
        paired = require(roc.auc_difference(model, reference))
        alone = require(roc.auc_interval(model))
        ratios.append((paired.high - paired.low) / (alone.high - alone.low))
        return paired

    assert 0.92 <= compute_coverage(sample, 0) <= 0.99
    assert np.mean(ratios) < 0.75


@pytest.mark.parametrize("shift", [0, 0.8, 1.4])
def test_tpr_difference_of_equal_models_is_rarely_significant(shift, monkeypatch):
    monkeypatch.setattr(roc, "_NUM_TPR_RESAMPLES", 200)

    def sample(rng):
        return roc.tpr_difference(*similar_models(rng, shift, 1, rows=(200, 200)), 0.01)

    assert compute_coverage(sample, 0, seeds=200) >= 0.95


@TIES
@pytest.mark.parametrize("fpr", [0.01, 0.07, 0.29, 0.5])
def test_tpr_at_fpr_agrees_with_the_roc_curve_of_scikit_learn(fpr, ties):
    signals = make_signals(nonmembers=100, ties=ties)
    count = len(signals.members)
    fprs, tprs, _ = metrics.roc_curve(
        [1] * count + [0] * 100, np.concatenate(signals[:2]), drop_intermediate=False
    )
    best = tprs[fprs <= fpr + EXACT].max()
    rate = require(roc.tpr_at_fpr(signals, fpr))
    assert rate.value == pytest.approx(best, abs=EXACT)
    assert rate == clopper_pearson(round(best * count), count)
    assert require(roc.tpr_at_fpr(signals, 1.0)).value == 1


def test_intervals_of_small_samples_have_a_width():
    for rows, low in ((1, 0), (3, 0.2), (1000, 0.998)):
        separated = Signals(np.arange(1, rows + 1), -np.arange(rows))
        interval = require(roc.auc_interval(separated))
        assert interval == pytest.approx((1, low, 1), abs=0.003)
    same = Signals(np.array([1, 2, 3]), np.array([1, 2, 0]))
    difference = require(roc.auc_difference(same, same))
    assert difference.value == 0 and difference.high > 0.3
    tied = require(roc.auc_interval(Signals(np.zeros(500), np.zeros(300))))
    assert tied.value == 0.5 and tied.high - tied.low < 0.02


def test_signals_without_rows_or_with_nan_have_no_auc_and_no_tpr():
    members, nonmembers, _ = make_signals(nonmembers=999)
    for signals in (
        Signals(members[:0], nonmembers),
        Signals(members, nonmembers[:0]),
        Signals(members, np.append(nonmembers, np.nan)),
        Signals(np.append(members, np.nan), nonmembers),
    ):
        assert roc.auc_interval(signals) is roc.auc_bootstrap(signals) is None
        assert roc.auc_difference(signals, signals) is None
        assert roc.tpr_at_fpr(signals, 0.01) is None
    # A rate of 0.1 % needs 1,000 non-members.
    signals = Signals(members, nonmembers)
    one_more = Signals(members, np.append(nonmembers, 0.0))
    assert roc.tpr_at_fpr(signals, 0.001) is None
    assert roc.tpr_at_fpr(one_more, 0.001) is not None
    with pytest.raises(ValueError, match="different numbers of rows"):
        roc.auc_difference(signals, one_more)


@pytest.mark.parametrize(
    "measure, num_models",
    [
        (roc.auc_interval, 1),
        (roc.auc_bootstrap, 1),
        (roc.auc_difference, 2),
        (lambda *x: roc.tpr_at_fpr(*x, 0.05), 1),
        (lambda *x: roc.tpr_difference(*x, 0.05), 2),
    ],
    ids=["auc", "bootstrap", "auc difference", "tpr", "tpr difference"],
)
def test_copies_of_rows_in_groups_do_not_narrow_an_interval(measure, num_models):
    rng = np.random.default_rng(5)
    model = make_signals(members=60, nonmembers=200)
    reference = Signals(*(x + rng.normal(size=len(x)) for x in model[:2]))
    models = (model, reference)[:num_models]
    groups = np.repeat(np.arange(60), 4), np.repeat(np.arange(200), 4)
    copies = [[np.repeat(x, 4) for x in signals[:2]] for signals in models]
    expected = measure(*models)
    grouped = measure(*(Signals(*x, groups) for x in copies))
    assert grouped == pytest.approx(expected, abs=EXACT)
    ungrouped = measure(*(Signals(*x) for x in copies))
    assert ungrouped.high - ungrouped.low < 0.8 * (expected.high - expected.low)
