"""Ranking scores agree with scikit-learn; gaps have the values computed by hand."""

import numpy as np
import pytest
from sklearn import metrics

from ccu_jax.metrics.ranking import (
    TOW_ATTACK,
    average_gap,
    macro_auroc,
    mean_average_precision,
    row_scores,
    score_difference,
    score_excess,
    tug_of_war,
)
from tests.metrics.samples import measured, random_labels, random_logits

EXACT = 1e-9
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_scores_agree_with_scikit_learn(seed, ties):
    logits, labels = random_logits(seed), random_labels(True, seed + 9)
    logits = np.round(logits) if ties else logits
    has_rows = labels.any(axis=0)
    truth, values = labels[:, has_rows], logits[:, has_rows]
    expected = metrics.average_precision_score(truth, values, average="macro")
    assert mean_average_precision(logits, labels) == pytest.approx(expected, abs=EXACT)
    expected = metrics.roc_auc_score(truth, values, average="macro")
    assert macro_auroc(logits, labels) == pytest.approx(expected, abs=EXACT)
    order = np.random.default_rng(1).permutation(len(logits))
    for score in (mean_average_precision, macro_auroc):
        mixed = score(logits[order], labels[order])
        assert mixed == pytest.approx(score(logits, labels), abs=EXACT)


def test_ranking_scores_need_rows_of_both_kinds():
    logits, labels = random_logits(), random_labels(True)
    for score in (mean_average_precision, macro_auroc):
        assert score(logits, 0 * labels) is None
        assert score(logits[:0], labels[:0]) is None
        assert score(np.nan * logits, labels) is None
    assert macro_auroc(logits, 0 * labels + 1) is None
    assert mean_average_precision(logits, 0 * labels + 1) == 1
    precision = labels[:, labels.any(axis=0)].mean()
    assert mean_average_precision(0 * logits, labels) == pytest.approx(precision)


@BOTH
def test_row_scores_average_to_those_of_scikit_learn(multi_label):
    logits, labels = random_logits(), random_labels(multi_label)
    if multi_label:
        predicted = logits > 0
        expected = metrics.f1_score(
            labels, predicted, average="samples", zero_division=0
        )
    else:
        expected = metrics.accuracy_score(labels.argmax(1), logits.argmax(1))
    scores = row_scores(logits, labels, multi_label)
    assert scores.shape == (80,) and scores.mean() == pytest.approx(expected, abs=EXACT)


@BOTH
def test_score_difference_is_paired_and_has_a_sign(multi_label):
    logits, labels = random_logits(), random_labels(multi_label)
    right = 9 * (2 * labels - 1)
    better = measured(score_difference(right, logits, labels, multi_label))
    worse = measured(score_difference(logits, right, labels, multi_label))
    assert better.low > 0 > worse.high
    assert better.value == pytest.approx(-worse.value)
    same = measured(score_difference(logits, logits, labels, multi_label))
    assert same.low < same.value == 0 < same.high < 0.05
    assert score_difference(logits * np.nan, logits, labels, multi_label) is None
    empty = logits[:0]
    assert score_difference(empty, empty, labels[:0], multi_label) is None


@BOTH
def test_score_excess_shows_what_is_better_on_the_unlearn_set_alone(multi_label):
    rows = 600
    logits, reference = random_logits(0, rows), random_logits(1, rows)
    labels, is_unlearn = random_labels(multi_label, rows=rows), np.arange(rows) < 300
    right = 9 * (2 * labels - 1)
    groups = np.arange(rows) // 2
    for of in (None, groups):
        arguments = (labels, is_unlearn, multi_label)
        all_better = score_excess(right, reference, *arguments, groups=of)
        assert abs(measured(all_better).value) < 0.15
        remembers = np.where(is_unlearn[:, None], right, logits)
        excess = score_excess(remembers, reference, *arguments, groups=of)
        assert measured(excess).low > 0.2
    assert score_excess(logits * np.nan, reference, *arguments) is None


def test_gap_and_tug_of_war_have_the_values_computed_by_hand():
    reference = {"unlearn": 0.6, "retain": 0.9, "test": 0.7, "attack": 0.5}
    model = {"unlearn": 0.8, "retain": 0.9, "test": 0.6, "attack": 0.6}
    assert average_gap(model, reference) == pytest.approx(10)
    assert tug_of_war(model, reference) == pytest.approx(0.8 * 1 * 0.9)
    with_attack = tug_of_war(model, reference, TOW_ATTACK)
    assert with_attack == pytest.approx(0.9 * 1 * 0.9)
    assert average_gap(reference, reference) == 0
    assert tug_of_war(reference, reference) == 1
    # Above and below the reference count alike.
    lower, higher = reference | {"unlearn": 0.4}, reference | {"unlearn": 0.8}
    for score in (average_gap, tug_of_war):
        assert score(lower, reference) == pytest.approx(score(higher, reference))
        assert score(reference | {"test": None}, reference) is None
    with pytest.raises(ValueError, match="same, non-empty score names"):
        average_gap({"test": 1.0}, reference)
