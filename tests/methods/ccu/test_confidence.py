"""Confidences and margins against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax.methods.ccu.confidence import (
    confidence,
    margin,
    recall_at_k,
    with_confidence,
)
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
    np.testing.assert_allclose(
        confidence(jnp.array(logits), jnp.array(labels), multi_label=multi_label),
        expected_confidence(p, labels, multi_label),
        rtol=1e-5,
    )


@each_label_kind
def test_with_confidence_hits_the_confidence(multi_label):
    rng = np.random.default_rng(1)
    base = 2 * rng.normal(size=(9, CLASSES))
    labels = random_labels(rng, 9, multi_label)
    g = np.linspace(-2.5, 3.5, 9)
    run = jax.jit(with_confidence, static_argnames="multi_label")
    p = np.asarray(run(base, labels, g, multi_label=multi_label))
    np.testing.assert_allclose(
        expected_confidence(p, labels, multi_label), g, atol=1e-3
    )
    assert (p >= 0).all() and (p <= 1).all()
    if not multi_label:
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
        # The other classes share the rest as the base logits say.
        others = scipy.special.softmax(np.where(labels > 0, -np.inf, base), axis=1)
        rest = (1 - (p * labels).sum(1, keepdims=True)) * others
        np.testing.assert_allclose(p * (1 - labels), rest, atol=1e-6)


def test_recall_and_margin():
    scores = jnp.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.9], [0.5, 0.4, 0.3]])
    multi, single = jnp.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]), jnp.eye(3)
    np.testing.assert_allclose(recall_at_k(scores, multi), [0.5, 1, 0])
    np.testing.assert_allclose(recall_at_k(scores, single), [1, 0, 0])
    np.testing.assert_allclose(
        margin(scores, single, multi_label=False), [0.4, -0.6, -0.2], atol=1e-6
    )
    np.testing.assert_allclose(
        margin(scores, multi, multi_label=True),
        expected_confidence(scores, np.asarray(multi), multi_label=True),
        rtol=1e-5,
    )
    # Scores are clipped to probabilities in [0.02, 0.98].
    clipped = margin(jnp.array([[2.0, -1.0]]), jnp.eye(2)[:1], multi_label=True)
    np.testing.assert_allclose(clipped, -np.log(-2 * np.log(0.98)), rtol=1e-4)
