"""Membership signals and attack rates agree with other code and with known effects."""

import math

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from ccu_jax.metrics import membership
from ccu_jax.metrics.intervals import clopper_pearson
from ccu_jax.metrics.membership import membership_signals, tpr_at_fpr, tpr_difference
from ccu_jax.metrics.roc import Signals
from tests.metrics.samples import (
    measured,
    normal_signals,
    random_labels,
    random_logits,
)

EXACT = 1e-9
NAMES = ("loss", "margin", "entropy", "modified_entropy")
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


# --- signals --------------------------------------------------------------------------


def test_signals_have_the_values_computed_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    labels = np.array([[1, 0, 0], [0, 0, 1]], float)
    ln = math.log
    entropy = 0.7 * ln(0.7) + 0.2 * ln(0.2) + 0.1 * ln(0.1)
    expected = {
        "loss": [ln(0.7), ln(0.1)],
        "margin": [ln(0.7 / 0.3), ln(0.1 / 0.9)],
        "entropy": [entropy, entropy],
        "modified_entropy": [
            0.3 * ln(0.7) + 0.2 * ln(0.8) + 0.1 * ln(0.9),
            0.9 * ln(0.1) + 0.7 * ln(0.3) + 0.2 * ln(0.8),
        ],
    }
    signals = membership_signals(logits, labels, False)
    for name in NAMES:
        np.testing.assert_allclose(signals[name], expected[name], atol=1e-12)


@BOTH
def test_log_likelihood_is_minus_the_log_loss_of_scikit_learn(multi_label):
    logits, labels = random_logits(), random_labels(multi_label)
    p = np.exp(logits.astype(np.float64))
    p = p / (1 + p) if multi_label else p / p.sum(axis=1, keepdims=True)
    pairs = zip(labels, p, strict=True)
    if multi_label:
        expected = [-5 * metrics.log_loss(y, q, labels=[0, 1]) for y, q in pairs]
    else:
        expected = [
            -metrics.log_loss([y.argmax()], [q], labels=range(5)) for y, q in pairs
        ]
    found = membership.log_likelihood(logits, labels, multi_label)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_true_probability_is_the_geometric_mean_over_labels():
    logits = np.log([[0.7 / 0.3, 0.2 / 0.8]])
    found = membership.true_probability(logits, np.array([[1, 0]]), True)
    assert found == pytest.approx([np.sqrt(0.7 * 0.8)])
    logits = np.log([[0.7, 0.2, 0.1]])
    found = membership.true_probability(logits, np.eye(3)[[1]], False)
    assert found == pytest.approx(0.2)


def test_two_classes_have_the_signals_of_one_binary_label():
    logits, labels = random_logits(classes=2), random_labels(False, classes=3)[:, :2]
    logits = logits.astype(np.float64)
    single = membership_signals(logits, labels, False)
    binary = membership_signals(logits[:, 1:] - logits[:, :1], labels[:, 1:], True)
    for name in NAMES:
        np.testing.assert_allclose(binary[name], single[name], atol=1e-12, err_msg=name)


def test_multi_label_signals_combine_those_of_each_label():
    logits, labels = random_logits(), random_labels(True)
    columns = [
        membership_signals(logits[:, k : k + 1], labels[:, k : k + 1], True)
        for k in range(logits.shape[1])
    ]
    for name, value in membership_signals(logits, labels, True).items():
        combine = np.mean if name == "margin" else np.sum
        expected = combine([column[name] for column in columns], axis=0)
        np.testing.assert_allclose(value, expected, atol=1e-9, err_msg=name)


@BOTH
def test_signals_rise_with_confidence_in_the_label(multi_label):
    truth = 2 * (labels := random_labels(multi_label)) - 1
    weak, strong, wrong = (
        membership_signals(scale * truth, labels, multi_label) for scale in (1, 4, -4)
    )
    for name in NAMES:
        assert (strong[name] > weak[name]).all(), name
        if name != "entropy":  # ignores the label
            assert (wrong[name] < weak[name]).all(), name


@BOTH
def test_signals_are_finite_and_independent_of_other_rows(multi_label):
    logits, labels = random_logits(), random_labels(multi_label)
    for extreme in (1e4 * logits, 0 * logits, np.sign(logits) * 1e6):
        for name, value in membership_signals(extreme, labels, multi_label).items():
            assert np.isfinite(value).all(), name
            assert name == "margin" or (value <= 0).all(), name
    one = membership_signals(logits[:1], labels[:1], multi_label)
    signals = membership_signals(logits, labels, multi_label)
    order = np.random.default_rng(1).permutation(len(logits))
    mixed = membership_signals(logits[order], labels[order], multi_label)
    for name in NAMES:
        np.testing.assert_allclose(one[name], signals[name][:1])
        np.testing.assert_allclose(mixed[name], signals[name][order])


def test_signals_resolve_probabilities_next_to_one():
    # 1 - 1e-18 is 1 in float64.
    labels = np.eye(3)[[0, 0]]
    logits = np.array([[0, np.log(1e-18), -99], [0, np.log(1e-20), -99]])
    for name in ("margin", "modified_entropy"):
        value = membership_signals(logits, labels, False)[name]
        assert value[0] < value[1], name
    margins = membership.margin(logits, labels, False)
    np.testing.assert_allclose(margins, -np.log([1e-18, 1e-20]), rtol=1e-9)


# --- true positive rates at low false positive rates ----------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("fpr", [0.01, 0.07, 0.29, 0.5])
def test_tpr_at_fpr_agrees_with_the_roc_curve_of_scikit_learn(fpr, ties):
    signals = normal_signals(nonmembers=100, ties=ties)
    count = len(signals.members)
    fprs, tprs, _ = metrics.roc_curve(
        [1] * count + [0] * 100, np.concatenate(signals[:2]), drop_intermediate=False
    )
    best = tprs[fprs <= fpr + EXACT].max()
    rate = measured(tpr_at_fpr(signals, fpr))
    assert rate.value == pytest.approx(best, abs=EXACT)
    assert rate == clopper_pearson(round(best * count), count)
    assert measured(tpr_at_fpr(signals, 1.0)).value == 1
    mixed = Signals(signals.members[::-1], signals.nonmembers[::-1])
    assert tpr_at_fpr(mixed, fpr) == rate


def test_tpr_is_none_if_there_are_too_few_nonmembers():
    members, nonmembers, _ = signals = normal_signals(nonmembers=999)
    assert tpr_at_fpr(signals, 0.01) is not None
    assert tpr_at_fpr(signals, 0.001) is None
    one_more = Signals(members, np.append(nonmembers, 0.0))
    assert tpr_at_fpr(one_more, 0.001) is not None
    assert tpr_at_fpr(Signals(members[:0], nonmembers), 0.01) is None
    assert tpr_at_fpr(Signals(np.array([np.nan]), nonmembers), 0.01) is None


def test_tpr_shows_a_model_that_remembers_a_fifth_of_the_rows():
    signals = normal_signals(shift=0, members=500, nonmembers=2000)
    assert measured(tpr_at_fpr(signals, 0.01)).low < 0.02
    signals.members[:100] += 6
    for fpr in (0.01, 0.001):
        assert measured(tpr_at_fpr(signals, fpr)).low > 0.15
    # Over-forgotten rows are found by the reversed signal.
    signals.members[:100] -= 12
    assert measured(tpr_at_fpr(signals, 0.01)).low < 0.02
    reversed_ = Signals(-signals.members, -signals.nonmembers)
    assert measured(tpr_at_fpr(reversed_, 0.01)).low > 0.15


@pytest.mark.parametrize("auc", [0.5, 0.65, 0.76])
def test_tpr_difference_of_equally_good_models_is_rarely_significant(auc):
    shift, wrong = math.sqrt(2) * scipy.stats.norm.ppf(auc), 0
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        sides = [rng.normal(m, 0.7, size=200) for m in (shift, 0)] * 2
        sides = [x + rng.normal(0, 0.7, size=200) for x in sides]
        model, reference = Signals(*sides[:2]), Signals(*sides[2:])
        difference = measured(tpr_difference(model, reference, 0.01, resamples=200))
        wrong += not difference.low <= 0 <= difference.high
    assert wrong / 200 <= 0.05
