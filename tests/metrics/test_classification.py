"""Scores agree with scikit-learn; gaps have the values computed by hand."""

import itertools
import warnings

import numpy as np
import pytest
from sklearn import metrics

from ccu_jax.metrics.classification import (
    TOW_ATTACK,
    average_gap,
    best_constant_score,
    macro_auroc,
    mean_average_precision,
    multi_label_scores,
    row_scores,
    score_difference,
    single_label_scores,
    tug_of_war,
)
from tests.metrics.samples import BOTH, EXACT, TIES, make_labels, make_logits, require


@pytest.mark.parametrize("seed", range(3))
@BOTH
def test_scores_agree_with_scikit_learn(multi_label, seed):
    logits, labels = make_logits(seed), make_labels(multi_label, seed + 9)
    logits[:, -1] = -9  # a class without true and predicted rows
    if multi_label:
        # Rows without true labels, without predicted ones, and without both.
        labels[:4], logits[:2], logits[6] = 0, -1, -1
        truth, predicted = labels, logits > 0
        averages, expected = ("micro", "macro", "weighted", "samples"), {}
        score, mean_of_rows = multi_label_scores, "samples_f1"
    else:
        truth, predicted = labels.argmax(1), logits.argmax(1)
        averages, expected = ("macro",), {"accuracy": (truth == predicted).mean()}
        score, mean_of_rows = single_label_scores, "accuracy"
    options = {"labels": range(5), "zero_division": 0}
    for average in averages:
        value = metrics.f1_score(truth, predicted, average=average, **options)
        expected[f"{average}_f1"] = value
    assert score(logits, labels) == pytest.approx(expected, abs=EXACT)
    by_row = row_scores(logits, labels, multi_label)
    assert by_row.shape == (80,)
    assert by_row.mean() == pytest.approx(expected[mean_of_rows], abs=EXACT)


@pytest.mark.parametrize("seed", range(3))
@TIES
def test_auroc_of_two_classes_agrees_with_scikit_learn(ties, seed):
    labels = make_labels(False, seed, rows=200, classes=3)[:, :2]
    logits = make_logits(seed, rows=200, classes=2) + 0.4 * labels
    logits = np.round(logits) if ties else logits
    score = logits[:, 1].astype(np.float64) - logits[:, 0]
    expected = pytest.approx(metrics.roc_auc_score(labels[:, 1], score), abs=EXACT)
    assert single_label_scores(logits, labels)["auroc"] == expected
    assert 1 - single_label_scores(-logits, labels)["auroc"] == expected


def test_auroc_is_not_rounded_and_needs_two_classes_with_rows():
    labels = np.eye(2)[[0, 1]]
    # The difference 1 - 1e-9 is rounded to 1 in float32.
    logits = np.array([[1e-9, 1], [0, 1]], np.float32)
    assert single_label_scores(logits, labels)["auroc"] == 1
    assert "auroc" not in single_label_scores(make_logits(), make_labels(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "auroc" not in single_label_scores(logits, labels[[0, 0]])


def test_best_constant_score_is_the_best_of_all_constant_predictions():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]], float)
    constants = (np.tile(x, (4, 1)) - 0.5 for x in itertools.product([0, 1], repeat=3))
    best = max(multi_label_scores(x, labels)["micro_f1"] for x in constants)
    assert best_constant_score(labels, True) == pytest.approx(best)
    assert best_constant_score(np.eye(3)[[0, 0, 1, 2]], False) == 0.5


@TIES
@pytest.mark.parametrize("seed", range(3))
def test_ranking_scores_agree_with_scikit_learn(seed, ties):
    logits, labels = make_logits(seed), make_labels(True, seed + 9)
    logits = np.round(logits) if ties else logits
    has_rows = labels.any(axis=0)
    order = np.random.default_rng(1).permutation(len(logits))
    for score, reference in (
        (mean_average_precision, metrics.average_precision_score),
        (macro_auroc, metrics.roc_auc_score),
    ):
        expected = reference(labels[:, has_rows], logits[:, has_rows], average="macro")
        scores = score(logits, labels), score(logits[order], labels[order])
        assert scores == pytest.approx((expected, expected), abs=EXACT)


def test_ranking_scores_need_rows_of_both_kinds():
    logits, labels = make_logits(), make_labels(True)
    for score in (mean_average_precision, macro_auroc):
        assert score(logits, 0 * labels) is None
        assert score(logits[:0], labels[:0]) is None
        assert score(np.nan * logits, labels) is None
    assert macro_auroc(logits, 0 * labels + 1) is None
    assert mean_average_precision(logits, 0 * labels + 1) == 1
    precision = labels[:, labels.any(axis=0)].mean()
    assert mean_average_precision(0 * logits, labels) == pytest.approx(precision)


@BOTH
def test_score_difference_is_paired_and_has_a_sign(multi_label):
    logits, labels = make_logits(), make_labels(multi_label)
    right = 9 * (2 * labels - 1)
    better = require(score_difference(right, logits, labels, multi_label))
    worse = require(score_difference(logits, right, labels, multi_label))
    assert better.low > 0 > worse.high
    assert better.value == pytest.approx(-worse.value)
    same = require(score_difference(logits, logits, labels, multi_label))
    assert same.low < same.value == 0 < same.high < 0.05
    for pair in (
        (logits * np.nan, logits, labels),
        (logits[:0], right[:0], labels[:0]),
    ):
        assert score_difference(*pair, multi_label) is None


def test_gap_and_tug_of_war_have_the_values_computed_by_hand():
    reference = {"unlearn": 0.6, "retain": 0.9, "test": 0.7, "attack": 0.5}
    model = {"unlearn": 0.8, "retain": 0.9, "test": 0.6, "attack": 0.6}
    assert average_gap(model, reference) == pytest.approx(10)
    assert tug_of_war(model, reference) == pytest.approx(0.8 * 1 * 0.9)
    assert tug_of_war(model, reference, TOW_ATTACK) == pytest.approx(0.9 * 1 * 0.9)
    assert average_gap(reference, reference) == 0
    assert tug_of_war(reference, reference) == 1
    # Above and below the reference count alike.
    lower, higher = reference | {"unlearn": 0.4}, reference | {"unlearn": 0.8}
    for score in (average_gap, tug_of_war):
        assert score(lower, reference) == pytest.approx(score(higher, reference))
        assert score(reference | {"test": None}, reference) is None
    with pytest.raises(ValueError, match="same, non-empty score names"):
        average_gap({"test": 1.0}, reference)
