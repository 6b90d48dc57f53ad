"""Membership signals have their defined values, also for extreme logits."""

import math

import numpy as np
import pytest

from ccu_jax.metrics import membership
from ccu_jax.metrics.membership import membership_signals
from tests.metrics.samples import BOTH, make_labels, make_logits

NAMES = ("loss", "margin", "entropy", "modified_entropy")


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


def test_true_probability_is_the_geometric_mean_over_labels():
    logits = np.log([[0.7 / 0.3, 0.2 / 0.8]])
    probability = membership.true_probability(logits, np.array([[1, 0]]), True)
    assert probability == pytest.approx([np.sqrt(0.7 * 0.8)])
    logits = np.log([[0.7, 0.2, 0.1]])
    probability = membership.true_probability(logits, np.eye(3)[[1]], False)
    assert probability == pytest.approx(0.2)


def test_two_classes_have_the_signals_of_one_binary_label():
    logits, labels = make_logits(classes=2), make_labels(False, classes=3)[:, :2]
    logits = logits.astype(np.float64)
    single = membership_signals(logits, labels, False)
    binary = membership_signals(logits[:, 1:] - logits[:, :1], labels[:, 1:], True)
    for name in NAMES:
        np.testing.assert_allclose(binary[name], single[name], atol=1e-12, err_msg=name)


def test_multi_label_signals_combine_those_of_each_label():
    logits, labels = make_logits(), make_labels(True)
    pairs = zip(np.hsplit(logits, 5), np.hsplit(labels, 5), strict=True)
    columns = [membership_signals(*pair, True) for pair in pairs]
    for name, value in membership_signals(logits, labels, True).items():
        combine = np.mean if name == "margin" else np.sum
        expected = combine([column[name] for column in columns], axis=0)
        np.testing.assert_allclose(value, expected, atol=1e-9, err_msg=name)


@BOTH
def test_signals_are_finite_and_independent_of_other_rows(multi_label):
    logits, labels = make_logits(), make_labels(multi_label)
    for extreme in (1e4 * logits, 0 * logits, np.sign(logits) * 1e6):
        for name, value in membership_signals(extreme, labels, multi_label).items():
            assert np.isfinite(value).all(), name
            assert name == "margin" or (value <= 0).all(), name
    signals = membership_signals(logits, labels, multi_label)
    single_row = membership_signals(logits[:1], labels[:1], multi_label)
    for name in NAMES:
        np.testing.assert_allclose(single_row[name], signals[name][:1])
    logits[0] = np.nan
    for values in membership_signals(logits, labels, multi_label).values():
        assert np.isnan(values).all()


def test_signals_resolve_probabilities_next_to_one():
    # 1 - 1e-18 is 1 in float64.
    labels = np.eye(3)[[0, 0]]
    logits = np.array([[0, np.log(1e-18), -99], [0, np.log(1e-20), -99]])
    for name in ("margin", "modified_entropy"):
        value = membership_signals(logits, labels, False)[name]
        assert value[0] < value[1], name
    margins = membership.margin(logits, labels, False)
    np.testing.assert_allclose(margins, -np.log([1e-18, 1e-20]), rtol=1e-9)
