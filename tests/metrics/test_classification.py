"""Accuracy, F1 and AUROC agree with scikit-learn."""

import itertools
import warnings

import numpy as np
import pytest
from sklearn import metrics

from ccu_jax.metrics.classification import (
    auc,
    best_constant_score,
    multi_label_scores,
    single_label_scores,
)
from tests.metrics.samples import normal_signals, random_labels, random_logits

EXACT = 1e-9
SEEDS = pytest.mark.parametrize("seed", range(3))
TIES = pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])


@SEEDS
def test_single_label_scores_agree_with_scikit_learn(seed):
    logits, labels = random_logits(seed), random_labels(False, seed + 9)
    logits[:, -1] = -9  # a class without true and predicted rows
    truth, predicted = labels.argmax(1), logits.argmax(1)
    expected = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "macro_f1": metrics.f1_score(
            truth, predicted, labels=range(5), average="macro", zero_division=0
        ),
    }
    scores = single_label_scores(logits, labels)
    assert scores == pytest.approx(expected, abs=EXACT)


@SEEDS
def test_multi_label_scores_agree_with_scikit_learn(seed):
    logits, labels = random_logits(seed), random_labels(True, seed + 9)
    # Rows and a class without true labels, without predicted ones, and without both.
    labels[:4], logits[:2], logits[6], logits[:, -1] = 0, -1, -1, -1
    expected = {
        f"{average}_f1": metrics.f1_score(
            labels, logits > 0, average=average, zero_division=0
        )
        for average in ("micro", "macro", "weighted", "samples")
    }
    assert multi_label_scores(logits, labels) == pytest.approx(expected, abs=EXACT)


@SEEDS
@TIES
def test_auroc_of_two_classes_agrees_with_scikit_learn(ties, seed):
    labels = random_labels(False, seed, rows=200, classes=3)[:, :2]
    logits = random_logits(seed, rows=200, classes=2) + 0.4 * labels
    logits = np.round(logits) if ties else logits
    score = logits[:, 1].astype(np.float64) - logits[:, 0]
    expected = metrics.roc_auc_score(labels[:, 1], score)
    auroc = single_label_scores(logits, labels)["auroc"]
    assert auroc == pytest.approx(expected, abs=EXACT)
    # Exchanged classes change nothing; reversed logits turn the ranking around.
    swapped = single_label_scores(logits[:, ::-1], labels[:, ::-1])
    assert swapped["auroc"] == pytest.approx(expected, abs=EXACT)
    reversed_ = single_label_scores(-logits, labels)
    assert reversed_["auroc"] == pytest.approx(1 - expected, abs=EXACT)


def test_auroc_is_not_rounded_and_needs_two_classes_with_rows():
    labels = np.eye(2)[[0, 1]]
    # The difference 1 - 1e-9 is rounded to 1 in float32.
    logits = np.array([[1e-9, 1], [0, 1]], np.float32)
    assert single_label_scores(logits, labels)["auroc"] == 1
    three = random_logits(), random_labels(False)
    assert "auroc" not in single_label_scores(*three)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = single_label_scores(logits, labels[[0, 0]])
    assert "auroc" not in one_class


@pytest.mark.parametrize("multi_label", [False, True])
def test_scores_of_right_and_wrong_predictions_are_one_and_zero(multi_label):
    score = multi_label_scores if multi_label else single_label_scores
    labels = random_labels(multi_label)[:, :4]
    labels = labels[labels.any(axis=1)]
    assert set(score(2 * labels - 1, labels).values()) == {1.0}
    assert set(score(1 - 2 * labels, labels).values()) == {0.0}


@SEEDS
@TIES
def test_auc_agrees_with_scikit_learn(ties, seed):
    members, nonmembers, _ = normal_signals(seed, ties=ties)
    truth = [1] * len(members) + [0] * len(nonmembers)
    expected = metrics.roc_auc_score(truth, np.concatenate([members, nonmembers]))
    assert auc(members, nonmembers) == pytest.approx(expected, abs=EXACT)
    assert auc(nonmembers, members) == pytest.approx(1 - expected, abs=EXACT)


def test_best_constant_score_is_the_best_of_all_constant_predictions():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]], float)
    constants = (np.tile(x, (4, 1)) - 0.5 for x in itertools.product([0, 1], repeat=3))
    best = max(multi_label_scores(x, labels)["micro_f1"] for x in constants)
    assert best_constant_score(labels, True) == pytest.approx(best)
    assert best_constant_score(np.eye(3)[[0, 0, 1, 2]], False) == 0.5
