"""Confidences, margins and statistics of valid rows against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax.methods.ccu import statistics as stats
from tests.toy import CLASSES, random_labels

each_label_kind = pytest.mark.parametrize(
    "multi_label", [False, True], ids=["single", "multi"]
)


def expected_confidence(probability, labels, multi_label):
    p = np.asarray(probability, np.float64)
    if multi_label:
        total = np.log(np.where(labels > 0, p, 1 - p)).sum(1)
    else:
        total = np.log((p * labels).sum(1))
    return -np.log(-total)


@each_label_kind
def test_confidence_equals_formula(multi_label):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, CLASSES)), random_labels(rng, 6, multi_label)
    p = scipy.special.expit(logits)
    if not multi_label:
        p = scipy.special.softmax(logits, axis=1)
    found = stats.confidence(jnp.array(logits), jnp.array(labels), multi_label)
    expected = expected_confidence(p, labels, multi_label)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@each_label_kind
def test_with_confidence_hits_the_confidence(multi_label):
    rng = np.random.default_rng(1)
    base = 2 * rng.normal(size=(9, CLASSES))
    labels = random_labels(rng, 9, multi_label)
    g = np.linspace(-2.5, 3.5, 9)
    compute = jax.jit(stats.probabilities_at_confidence, static_argnums=3)
    p = np.asarray(compute(base, labels, g, multi_label))
    found = expected_confidence(p, labels, multi_label)
    np.testing.assert_allclose(found, g, atol=1e-3)
    assert (p >= 0).all() and (p <= 1).all()
    if not multi_label:
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
        # The other classes share the rest as the base logits say.
        shares = scipy.special.softmax(np.where(labels > 0, -np.inf, base), axis=1)
        rest = (1 - (p * labels).sum(1, keepdims=True)) * shares
        np.testing.assert_allclose(p * (1 - labels), rest, atol=1e-6)


def test_recall_and_margin():
    scores = jnp.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.9], [0.5, 0.4, 0.3]])
    multi, single = jnp.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]), jnp.eye(3)
    np.testing.assert_allclose(stats.r_precision(scores, multi), [0.5, 1, 0])
    np.testing.assert_allclose(stats.r_precision(scores, single), [1, 0, 0])
    found = stats.margin(scores, single, multi_label=False)
    np.testing.assert_allclose(found, [0.4, -0.6, -0.2], atol=1e-6)
    found = stats.margin(scores, multi, multi_label=True)
    expected = expected_confidence(scores, np.asarray(multi), multi_label=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Scores are clipped to probabilities in [0.02, 0.98].
    clipped = stats.margin(jnp.array([[2.0, -1.0]]), jnp.eye(2)[:1], multi_label=True)
    np.testing.assert_allclose(clipped, -np.log(-2 * np.log(0.98)), rtol=1e-4)


def values_and_mask(rng, num_rows):
    """Values of which some are invalid and large."""
    valid = rng.random(num_rows) < 0.6
    valid[0], valid[-1] = True, False
    values = rng.normal(size=num_rows).astype(np.float32)
    values[~valid] = 50 * rng.normal(size=(~valid).sum())
    return jnp.array(values), jnp.array(valid)


def test_simple_values():
    valid = jnp.ones(4, bool)
    ranks = stats.rank(jnp.array([5.0, -1.0, 9.0, 0.0]), valid)
    np.testing.assert_allclose(ranks, [0.625, 0.125, 0.875, 0.375])
    ecdf = stats.ecdf(jnp.array([0.0, 2, 9]), jnp.array([3.0, 1, 2, 2]), valid)
    np.testing.assert_allclose(ecdf, np.array([0.5, 2.5, 4.5]) / 5, rtol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 101])
def test_quantiles_equal_those_of_numpy(num_rows):
    rng = np.random.default_rng(num_rows)
    values, valid = values_and_mask(rng, 2 * num_rows)
    q = np.array([0.0, 1.0, 0.5, *rng.random(9)], np.float32)
    found = stats.quantile(jnp.array(q), values, valid)
    expected = np.quantile(np.asarray(values)[np.asarray(valid)], q)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_line_is_fitted_to_the_valid_rows():
    rng = np.random.default_rng(3)
    x = jnp.array(rng.normal(size=(50, 2)))
    y = x @ jnp.array([2.0, -1.0]) + 0.5
    valid = jnp.arange(50) < 40
    predict = stats.fit_line(x, jnp.where(valid, y, 7.0), valid)
    np.testing.assert_allclose(predict(x), y, atol=2e-3)
