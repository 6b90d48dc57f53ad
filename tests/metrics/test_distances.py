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
from tests.metrics.samples import measured, random_logits

EXACT = 1e-9
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


def embeddings(seed=0, rows=150, classes=3, width=6):
    """Returns clustered embeddings `[N, D]` and their labels `[N, K]`."""
    rng = np.random.default_rng(seed)
    labels = np.eye(classes)[rng.integers(classes, size=rows)]
    centers = 3 * rng.normal(size=(classes, width))
    return labels @ centers + rng.normal(size=(rows, width)), labels


def rotation(width=6):
    return np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))[0]


# --- predictions ----------------------------------------------------------------------


def test_js_divergence_agrees_with_scipy():
    one, two = (random_logits(seed).astype(np.float64) for seed in (0, 1))
    p, q = (scipy.special.softmax(x, axis=1) for x in (one, two))
    expected = jensenshannon(p, q, axis=1, base=2) ** 2
    np.testing.assert_allclose(js_divergence(one, two, False), expected, atol=EXACT)
    p, q = (scipy.special.expit(np.stack([x, -x])) for x in (one, two))
    expected = (jensenshannon(p, q, axis=0, base=2) ** 2).mean(axis=1)
    np.testing.assert_allclose(js_divergence(one, two, True), expected, atol=EXACT)


@BOTH
def test_equal_predictions_have_distance_zero_and_opposite_ones_the_largest(
    multi_label,
):
    logits = 50 * np.sign(random_logits())
    opposite, largest = -logits, math.sqrt(5)
    if not multi_label:
        logits = 50 * np.eye(5)[np.random.default_rng(0).integers(5, size=80)]
        opposite, largest = np.roll(logits, 1, axis=1), math.sqrt(2)
    pair = logits, opposite, multi_label
    np.testing.assert_allclose(js_divergence(*pair), 1, atol=1e-9)
    np.testing.assert_allclose(activation_distance(*pair), largest)
    assert not agreement(*pair).any()
    same = logits, logits, multi_label
    assert (js_divergence(*same) < EXACT).all()
    assert not activation_distance(*same).any()
    assert agreement(*same).all()


@BOTH
def test_distances_of_predictions_are_those_of_the_changed_rows(multi_label):
    logits = random_logits()
    other = logits.copy()
    other[:8] += 2 * random_logits(1)[:8]
    for distance in (js_divergence, activation_distance):
        values = distance(logits, other, multi_label)
        assert values.shape == (80,)
        assert (values[:8] > 0.001).all() and (values[8:] < EXACT).all()
        assert np.isfinite(distance(1e4 * logits, -1e4 * other, multi_label)).all()
        one = distance(logits[:1], other[:1], multi_label)
        np.testing.assert_allclose(one, values[:1])
        np.testing.assert_allclose(distance(other, logits, multi_label), values)
    assert agreement(logits, other, multi_label)[8:].all()
    assert agreement(logits, other, multi_label)[:8].mean() < 1


# --- embeddings -----------------------------------------------------------------------


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
    interval = measured(cka_interval(x, y))
    assert interval == pytest.approx(jackknife_interval(cka, x, y), abs=EXACT)
    assert cka_interval(y, x) == pytest.approx(interval, abs=EXACT)
    assert interval.low < interval.value < interval.high


def test_cka_ignores_rotation_and_scale_and_is_zero_for_unrelated_embeddings():
    x, _ = embeddings()
    assert measured(cka_interval(x, 3 * x @ rotation() - 7)).value == pytest.approx(1)
    noisy = x + np.random.default_rng(2).normal(size=x.shape)
    interval = measured(cka_interval(x, noisy))
    assert 0.5 < interval.value < 0.99 and interval.high - interval.low < 0.3
    # Even with more dimensions than rows.
    wide, other = np.random.default_rng(3).normal(size=(2, 60, 300))
    assert abs(measured(cka_interval(wide, other)).value) < 0.1
    tiny = measured(cka_interval(1e150 * x, 1e-150 * x))
    assert tiny.value == pytest.approx(1)


def test_collapsed_embeddings_have_no_similarity():
    x, labels = embeddings()
    same = np.ones_like(x) * 0.3 + 1e-9 * x  # equal up to float32 rounding
    for pair in ((x, same), (same, x), (same, same), (x[:9], x[:9]), (x * np.nan, x)):
        assert cka_interval(*pair) is None
    assert measured(intra_class_similarity(x, same, labels)).value == 0
    assert intra_class_similarity(same, same, labels) is None
    assert intra_class_similarity(x[:2], x[:2], labels[:2]) is None
    assert scatter_ratio(same, labels) is None
    assert scatter_ratio(x[:1], labels[:1]) is None


def test_scatter_ratio_is_within_over_between():
    z = np.array([[0.0], [2], [10], [12]])
    labels = np.eye(2)[[0, 0, 1, 1]]
    assert scatter_ratio(z, labels) == pytest.approx(4 / 100)
    assert scatter_ratio(7 * z + 1, labels) == pytest.approx(4 / 100)
    # The third row counts in both classes, whose means are 2 and 8; of all 22 / 5.
    z, labels = np.array([[0.0], [0], [6], [10]]), np.eye(2)[[0, 0, 0, 1]]
    labels[2, 1] = 1
    within = 2 * 2**2 + 4**2 + 2 * 2**2
    between = 3 * (2 - 22 / 5) ** 2 + 2 * (8 - 22 / 5) ** 2
    assert scatter_ratio(z, labels) == pytest.approx(within / between)


def test_scatter_ratio_is_four_times_that_of_classes_half_as_wide():
    z, labels = embeddings()
    centers = labels @ np.linalg.lstsq(labels, z, rcond=None)[0]
    ratio = measured(scatter_ratio(z, labels))
    loose = centers + 2 * (z - centers)
    assert scatter_ratio(loose, labels) == pytest.approx(4 * ratio)


def test_intra_class_similarity_is_kept_by_rotation_and_lost_by_a_shuffle():
    x, labels = embeddings()
    rotated = measured(intra_class_similarity(x, 2 * x @ rotation() + 1, labels))
    assert rotated.value == pytest.approx(1)
    # Rows change places within their class: the classes stay where they are.
    rng = np.random.default_rng(2)
    order = np.arange(len(x))
    for k in range(3):
        rows = np.flatnonzero(labels[:, k])
        order[rows] = rng.permutation(rows)
    shuffled = measured(intra_class_similarity(x, x[order], labels))
    assert abs(shuffled.value) < 0.15
    ratio = scatter_ratio(x, labels)
    assert scatter_ratio(x[order], labels) == pytest.approx(ratio)
    noisy = x + rng.normal(size=x.shape)
    assert 0.2 < measured(intra_class_similarity(x, noisy, labels)).value < 0.9


def test_intra_class_similarity_is_the_mean_correlation_of_distances():
    x, labels = embeddings(rows=40)
    y = np.tanh(x)
    expected = []
    for k in range(3):
        rows = labels[:, k] > 0
        expected.append(np.corrcoef(pdist(x[rows]), pdist(y[rows]))[0, 1])
    similarity = measured(intra_class_similarity(x, y, labels))
    assert similarity.value == pytest.approx(np.mean(expected), abs=EXACT)


@pytest.mark.parametrize("max_rows", [20, 200])
def test_order_of_rows_does_not_change_distances_of_embeddings(max_rows, monkeypatch):
    monkeypatch.setattr(distances, "_MAX_ROWS_PER_CLASS", max_rows)  # of about 100
    x, labels = embeddings(rows=300)
    y = x + np.random.default_rng(1).normal(size=x.shape)
    order = np.random.default_rng(2).permutation(len(x))
    mixed = x[order], y[order], labels[order]
    similarity = measured(intra_class_similarity(x, y, labels)).value
    again = measured(intra_class_similarity(*mixed)).value
    assert again == pytest.approx(similarity, abs=EXACT)
    value = measured(cka_interval(x, y)).value
    assert measured(cka_interval(*mixed[:2])).value == pytest.approx(value)
    ratio = scatter_ratio(x, labels)
    assert scatter_ratio(mixed[0], mixed[2]) == pytest.approx(ratio)
