"""The ridge agrees with scikit-learn; the probe shows what features remember."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import linear_model

from ccu_jax.evaluate.predictions import Predictions, attack_auc
from ccu_jax.evaluate.ridge import probe_margin, ridge
from ccu_jax.models import VIEWS
from tests import toy


def fit(features, labels, weight=None, strength=0.5):
    weight = np.ones(len(features), bool) if weight is None else weight
    return ridge(jnp.asarray(features), jnp.asarray(labels), weight, strength)


@pytest.fixture
def data():
    rng = np.random.default_rng(6)
    return rng.normal(size=(30, 4)), rng.random((30, 3))


def test_ridge_agrees_with_scikit_learn(data):
    x, y = data
    penalty = 0.5 * x.var(axis=0).sum() * len(x) / 4
    expected = linear_model.Ridge(penalty).fit(x, y).predict(np.eye(4))
    predict, _ = fit(x, y)
    np.testing.assert_allclose(predict(jnp.eye(4)), expected, atol=1e-5)


def test_leave_one_out_scores_are_those_of_a_ridge_without_the_row(data):
    x, y = data
    penalty = 0.5 * x.var(axis=0).sum() * len(x) / 4  # that of all rows
    _, left_out = fit(x, y)
    for row in range(len(x)):
        rest = np.arange(len(x)) != row
        model = linear_model.Ridge(penalty).fit(x[rest], y[rest])
        expected = model.predict(x[row : row + 1])[0]
        np.testing.assert_allclose(left_out[row], expected, atol=1e-5)


def test_ridge_ignores_padding(data):
    x, y = data
    weight = np.random.default_rng(9).random(len(x)) < 0.5
    expected, expected_left_out = fit(x[weight], y[weight])
    predict, left_out = fit(
        np.where(weight[:, None], x, 30 * x), np.where(weight[:, None], y, -7), weight
    )
    np.testing.assert_allclose(predict(jnp.eye(4)), expected(jnp.eye(4)), atol=1e-5)
    np.testing.assert_allclose(left_out[weight], expected_left_out, atol=1e-5)


def test_probe_margin_is_that_of_a_ridge_on_the_fitted_rows():
    rng = np.random.default_rng(1)
    features, is_fitted = rng.normal(size=(90, 6)), np.arange(90) % 3 > 0
    labels = np.eye(4)[rng.integers(4, size=90)]
    alpha = 2.5 * features[is_fitted].var(axis=0).sum() * is_fitted.sum() / 6
    model = linear_model.Ridge(alpha).fit(features[is_fitted], labels[is_fitted])
    scores = model.predict(features)
    other = np.where(labels > 0, -np.inf, scores).max(axis=1)
    margin = probe_margin(features, labels, is_fitted, False, strength=2.5)
    np.testing.assert_allclose(margin, (scores * labels).sum(1) - other, atol=1e-9)
    nan = probe_margin(features * np.nan, labels, is_fitted, False)
    assert np.isnan(nan).all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_probe_shows_what_features_remember_and_nothing_else(multi_label):
    rng = np.random.default_rng(0)
    split = np.repeat(["retain", "unlearn", "unseen"], [400, 200, 200])
    labels = toy.random_labels(rng, len(split), multi_label)
    is_fitted, is_trained = split == "retain", split != "unseen"
    plain = labels @ rng.normal(size=(3, 20)) + 3 * rng.normal(size=(len(split), 20))
    shift = labels @ rng.normal(size=(3, 20))
    trained = plain + 2 * is_trained[:, None] * shift

    def attack(features):
        margin = probe_margin(features, labels, is_fitted, multi_label)
        zeros, every = np.zeros((len(split), 3)), np.ones(len(split), bool)
        predictions = Predictions(
            logits=dict.fromkeys(VIEWS, zeros),
            pair=zeros[:, 0],
            labels=labels,
            split=split,
            id=split,
            has_image=every,
            has_text=every,
            multi_label=multi_label,
            trunk_probe=margin,
            group=split,
        )
        auc = attack_auc(predictions)["white"]
        assert auc is not None
        return auc

    assert attack(trained) > 0.7
    assert 0.4 < attack(plain) < 0.6
