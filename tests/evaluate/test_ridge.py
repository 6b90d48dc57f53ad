"""The ridge agrees with scikit-learn; the probe shows what features remember."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import linear_model

from ccu_jax.evaluate.ridge import fit_ridge, probe_margin
from ccu_jax.metrics.classification import auc
from tests import toy


@pytest.mark.parametrize("padding", [0, 0.5])
def test_ridge_and_its_leave_one_out_scores_agree_with_scikit_learn(padding):
    rng = np.random.default_rng(6)
    x, y, weight = rng.normal(size=(30, 4)), rng.random((30, 3)), rng.random(30)
    is_row = weight >= padding
    penalty = 0.5 * x[is_row].var(axis=0).sum() * is_row.sum() / 4

    def predict_by_reference(rows, inputs):
        return linear_model.Ridge(penalty).fit(x[rows], y[rows]).predict(inputs)

    padded = np.where(is_row[:, None], x, 30 * x), np.where(is_row[:, None], y, -7)
    predict, left_out = fit_ridge(*map(jnp.asarray, padded), is_row, 0.5)
    expected = predict_by_reference(is_row, np.eye(4))
    np.testing.assert_allclose(predict(jnp.eye(4)), expected, atol=1e-5)
    for row in np.flatnonzero(is_row):
        others = is_row & (np.arange(30) != row)
        expected = predict_by_reference(others, x[row : row + 1])[0]
        np.testing.assert_allclose(left_out[row], expected, atol=1e-5)


def test_probe_margin_is_that_of_a_ridge_on_the_fitted_rows():
    rng = np.random.default_rng(1)
    features, is_fitted = rng.normal(size=(90, 6)), np.arange(90) % 3 > 0
    labels = np.eye(4)[rng.integers(4, size=90)]
    alpha = 2.5 * features[is_fitted].var(axis=0).sum() * is_fitted.sum() / 6
    model = linear_model.Ridge(alpha).fit(features[is_fitted], labels[is_fitted])
    scores = model.predict(features)
    highest_wrong = np.where(labels > 0, -np.inf, scores).max(axis=1)
    expected = (scores * labels).sum(1) - highest_wrong
    margin = probe_margin(features, labels, is_fitted, False, strength=2.5)
    np.testing.assert_allclose(margin, expected, atol=1e-9)
    assert np.isnan(probe_margin(features * np.nan, labels, is_fitted, False)).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_probe_shows_what_features_remember_and_nothing_else(multi_label):
    rng = np.random.default_rng(0)
    split = np.repeat(["retain", "unlearn", "unseen"], [400, 200, 200])
    labels = toy.random_labels(rng, len(split), multi_label)
    plain = labels @ rng.normal(size=(3, 20)) + 3 * rng.normal(size=(len(split), 20))
    shift = labels @ rng.normal(size=(3, 20))
    trained = plain + 2 * (split != "unseen")[:, None] * shift
    for features, low, high in ((trained, 0.7, 1), (plain, 0.4, 0.6)):
        margin = probe_margin(features, labels, split == "retain", multi_label)
        assert low < auc(margin[split == "unlearn"], margin[split == "unseen"]) < high
