"""Distances agree with other code and notice what changed and nothing else."""

import math

import numpy as np
import pytest
import scipy.special
from scipy.spatial.distance import jensenshannon, pdist

from ccu_jax.metrics import distances
from ccu_jax.metrics.distances import (
    activation_distance,
    agreement,
    cka_interval,
    intra_class_similarity,
    js_divergence,
    scatter_ratio,
)
from ccu_jax.metrics.intervals import jackknife_interval
from tests.metrics.samples import BOTH, EXACT, make_logits, require


def embeddings(seed=0, rows=150, classes=3, width=6):
    """Returns clustered embeddings `[N, D]` and their labels `[N, K]`."""
    rng = np.random.default_rng(seed)
    labels = np.eye(classes)[rng.integers(classes, size=rows)]
    centers = 3 * rng.normal(size=(classes, width))
    return labels @ centers + rng.normal(size=(rows, width)), labels


def rotation(width=6):
    return np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]


@BOTH
def test_distances_of_predictions_agree_with_their_definitions(multi_label):
    logits = [make_logits(seed).astype(np.float64) for seed in (0, 1)]
    if multi_label:
        p, q = (scipy.special.expit(np.stack([x, -x], axis=-1)) for x in logits)
        same = (logits[0] > 0) == (logits[1] > 0)
    else:
        p, q = (scipy.special.softmax(x, axis=1)[:, None] for x in logits)
        same = logits[0].argmax(1, keepdims=True) == logits[1].argmax(1, keepdims=True)
    divergence = (jensenshannon(p, q, axis=2, base=2) ** 2).mean(axis=1)
    distance = np.sqrt(((p - q) ** 2).sum(axis=(1, 2)) / (1 + multi_label))
    for measure, expected in (
        (js_divergence, divergence),
        (activation_distance, distance),
        (agreement, same.mean(axis=1)),
    ):
        values = measure(*logits, multi_label)
        np.testing.assert_allclose(values, expected, atol=EXACT)


@BOTH
@pytest.mark.parametrize("scale", [50, 1e6])
def test_equal_predictions_have_distance_0_and_opposite_the_largest(scale, multi_label):
    logits = scale * np.sign(make_logits())
    opposite, largest = -logits, math.sqrt(5)
    if not multi_label:
        logits = scale * np.eye(5)[np.random.default_rng(0).integers(5, size=80)]
        opposite, largest = np.roll(logits, 1, axis=1), math.sqrt(2)
    for reference, divergence, distance in ((logits, 0, 0), (opposite, 1, largest)):
        pair = logits, reference, multi_label
        np.testing.assert_allclose(js_divergence(*pair), divergence, atol=EXACT)
        np.testing.assert_allclose(activation_distance(*pair), distance)
        assert (agreement(*pair) == (distance == 0)).all()


def cka(x, y):
    """The unbiased CKA by its definition, from the kernels of all pairs of rows."""

    def hsic(x, y):
        k, m = (z @ z.T * (1 - np.eye(len(z))) for z in (x, y))
        n, ones = len(x), np.ones(len(x))
        means = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return np.trace(k @ m) + means - 2 / (n - 2) * ones @ k @ m @ ones

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def test_cka_agrees_with_its_definition_and_the_jackknife():
    x, _ = embeddings(0, rows=40)
    y = np.tanh(x @ np.random.default_rng(1).normal(size=(6, 9))) + 5
    interval = require(cka_interval(x, y))
    assert interval == pytest.approx(jackknife_interval(cka, x, y), abs=EXACT)
    assert cka_interval(y, x) == pytest.approx(interval, abs=EXACT)
    assert interval.low < interval.value < interval.high


def test_cka_ignores_rotation_and_scale_and_is_zero_for_unrelated_embeddings():
    x, _ = embeddings()
    assert require(cka_interval(x, 3 * x @ rotation() - 7)).value == pytest.approx(1)
    assert require(cka_interval(1e150 * x, 1e-150 * x)).value == pytest.approx(1)
    # Even with more dimensions than rows.
    unrelated = np.random.default_rng(3).normal(size=(2, 60, 300))
    assert abs(require(cka_interval(*unrelated)).value) < 0.1


def test_collapsed_embeddings_have_no_similarity():
    x, labels = embeddings()
    same = np.ones_like(x) * 0.3 + 1e-9 * x  # equal up to float32 rounding
    for pair in ((x, same), (same, x), (same, same), (x[:9], x[:9]), (x * np.nan, x)):
        assert cka_interval(*pair) is None
    assert require(intra_class_similarity(x, same, labels)).value == 0
    assert intra_class_similarity(same, same, labels) is None
    assert intra_class_similarity(x[:2], x[:2], labels[:2]) is None
    assert scatter_ratio(same, labels) is None
    assert scatter_ratio(x[:1], labels[:1]) is None


def test_scatter_ratio_is_within_over_between():
    z, labels = np.array([[0.0], [2], [10], [12]]), np.eye(2)[[0, 0, 1, 1]]
    for scaled in (z, 7 * z + 1):
        assert scatter_ratio(scaled, labels) == pytest.approx(4 / 100)
    # The third row counts in both classes, whose means are 2 and 8; of all 22 / 5.
    z, labels = np.array([[0.0], [0], [6], [10]]), np.eye(2)[[0, 0, 0, 1]]
    labels[2, 1] = 1
    within = 2 * 2**2 + 4**2 + 2 * 2**2
    between = 3 * (2 - 22 / 5) ** 2 + 2 * (8 - 22 / 5) ** 2
    assert scatter_ratio(z, labels) == pytest.approx(within / between)


def test_intra_class_similarity_is_the_mean_correlation_of_distances():
    x, labels = embeddings(rows=40)
    y = np.tanh(x)
    classes = [labels[:, k] > 0 for k in range(3)]
    expected = [np.corrcoef(pdist(x[c]), pdist(y[c]))[0, 1] for c in classes]
    similarity = require(intra_class_similarity(x, y, labels))
    assert similarity.value == pytest.approx(np.mean(expected), abs=EXACT)
    rotated = require(intra_class_similarity(x, 2 * x @ rotation() + 1, labels))
    assert rotated.value == pytest.approx(1)


@pytest.mark.parametrize("max_rows", [20, 200])
def test_order_of_rows_does_not_change_distances_of_embeddings(max_rows, monkeypatch):
    monkeypatch.setattr(distances, "_MAX_ROWS_PER_CLASS", max_rows)  # of about 100
    x, labels = embeddings(rows=300)
    y = x + np.random.default_rng(1).normal(size=x.shape)
    order = np.random.default_rng(2).permutation(len(x))
    for measure, arrays in (
        (lambda *x: require(intra_class_similarity(*x)).value, (x, y, labels)),
        (lambda *x: require(cka_interval(*x)).value, (x, y)),
        (scatter_ratio, (x, labels)),
    ):
        mixed = measure(*(array[order] for array in arrays))
        assert mixed == pytest.approx(measure(*arrays), abs=EXACT)
