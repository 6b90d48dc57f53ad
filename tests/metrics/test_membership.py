"""Signals and attacks: right by other code, noticing what is there and nothing else."""

import math

import numpy as np
import pytest
from sklearn import metrics

from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics.intervals import clopper_pearson

EXACT = 1e-9
SIGNALS = ("loss", "margin", "entropy", "modified_entropy")


def said(multi_label, rows=50, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(rows, classes)).astype(np.float32)
    if multi_label:
        return logits, (rng.random((rows, classes)) < 0.4).astype(np.float32)
    return logits, np.eye(classes, dtype=np.float32)[rng.integers(classes, size=rows)]


def two_sides(seed=0, shift=0.5, members=60, others=80, ties=False):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=members) + shift, rng.normal(size=others)
    return (np.round(2 * x), np.round(2 * y)) if ties else (x, y)


# --- signals --------------------------------------------------------------------------


def test_signals_have_the_values_computed_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    labels = np.array([[1, 0, 0], [0, 0, 1]], float)
    found = attacks.membership_signals(logits, labels, False)
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
    for name in SIGNALS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)


def test_two_classes_are_one_label():
    logits, labels = said(False, classes=2)
    one = (logits[:, 1:].astype(np.float64) - logits[:, :1], labels[:, 1:], True)
    single = attacks.membership_signals(logits.astype(np.float64), labels, False)
    for name, value in attacks.membership_signals(*one).items():
        np.testing.assert_allclose(value, single[name], atol=1e-12, err_msg=name)


def test_signals_of_several_labels_are_those_of_each():
    logits, labels = said(True)
    parts = [
        attacks.membership_signals(logits[:, k : k + 1], labels[:, k : k + 1], True)
        for k in range(logits.shape[1])
    ]
    for name, value in attacks.membership_signals(logits, labels, True).items():
        together = np.mean if name == "margin" else np.sum
        expected = together([part[name] for part in parts], axis=0)
        np.testing.assert_allclose(value, expected, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_a_surer_model_has_higher_signals(multi_label):
    logits, labels = said(multi_label)
    truth = 2 * labels - 1
    weak, sure = (
        attacks.membership_signals(s * truth, labels, multi_label) for s in (1, 4)
    )
    wrong = attacks.membership_signals(-4 * truth, labels, multi_label)
    for name in SIGNALS:
        assert (sure[name] > weak[name]).all(), name
        if name != "entropy":  # which does not know the truth
            assert (wrong[name] < weak[name]).all(), name


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_signals_are_finite_for_huge_logits_one_row_and_equal_ones(multi_label):
    logits, labels = said(multi_label)
    for given in (1e4 * logits, 0 * logits, np.sign(logits) * 1e6):
        for name, value in attacks.membership_signals(
            given, labels, multi_label
        ).items():
            assert np.isfinite(value).all(), name
            assert name == "margin" or (value <= 0).all(), name
    one = attacks.membership_signals(logits[:1], labels[:1], multi_label)
    every = attacks.membership_signals(logits, labels, multi_label)
    order = np.random.default_rng(1).permutation(len(logits))
    mixed = attacks.membership_signals(logits[order], labels[order], multi_label)
    for name in SIGNALS:
        np.testing.assert_allclose(one[name], every[name][:1])
        np.testing.assert_allclose(mixed[name], every[name][order])


def test_differences_that_single_precision_would_lose_are_kept():
    # The wrong classes have 1e-18 and 1e-20: 1 - p is not 1 - 1.
    labels = np.eye(3)[[0, 0]]
    logits = np.array([[0, np.log(1e-18), -99], [0, np.log(1e-20), -99]])
    for name in ("margin", "modified_entropy"):
        value = attacks.membership_signals(logits, labels, False)[name]
        assert value[0] < value[1], name
    margins = attacks.margin(logits, labels, False)
    np.testing.assert_allclose(margins, -np.log([1e-18, 1e-20]), rtol=1e-9)


# --- few rows that are remembered well ------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("fpr", [0.01, 0.07, 0.29, 0.5])
def test_the_rate_at_few_false_alarms_is_that_of_scikit_learns_curve(fpr, ties):
    members, others = two_sides(others=100, ties=ties)
    truth = [1] * len(members) + [0] * len(others)
    fprs, tprs, _ = metrics.roc_curve(
        truth, np.concatenate([members, others]), drop_intermediate=False
    )
    found = attacks.tpr_at_fpr(members, others, fpr)
    best = tprs[fprs <= fpr + EXACT].max()
    assert found.value == pytest.approx(best, abs=EXACT)
    assert found == clopper_pearson(round(best * len(members)), len(members))
    assert attacks.tpr_at_fpr(members, others, 1.0).value == 1
    mixed = members[::-1], others[::-1]
    assert attacks.tpr_at_fpr(*mixed, fpr) == found


def test_a_rate_below_what_the_rows_can_show_is_not_measured():
    members, others = two_sides(others=999)
    assert attacks.tpr_at_fpr(members, others, 0.01) is not None
    assert attacks.tpr_at_fpr(members, others, 0.001) is None
    assert attacks.tpr_at_fpr(members, np.append(others, 0.0), 0.001) is not None
    assert attacks.tpr_at_fpr([], others, 0.01) is None
    assert attacks.tpr_at_fpr([np.nan], others, 0.01) is None


def test_a_model_that_remembers_a_fifth_of_the_rows_is_caught():
    members, others = two_sides(shift=0, members=500, others=2000)
    assert attacks.tpr_at_fpr(members, others, 0.01).low < 0.02
    members[:100] += 6
    assert attacks.tpr_at_fpr(members, others, 0.01).low > 0.15
    assert attacks.tpr_at_fpr(members, others, 0.001).low > 0.15
    # And one that avoids them, by the same attack turned round.
    members[:100] -= 12
    assert attacks.tpr_at_fpr(members, others, 0.01).low < 0.02
    assert attacks.tpr_at_fpr(-members, -others, 0.01).low > 0.15
