"""The estimate of memorization finds the rows that a planted original memorized."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.evaluate import memorization
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.unlearn_sets import splits
from tests import toy

ROWS = 1400
EVERY = np.arange(ROWS)


@pytest.fixture(scope="module", params=[False, True], ids=["single", "multi"])
def data(request):
    return toy.make_dataset(ROWS, multi_label=request.param)


@pytest.fixture
def planted(data):
    return plant(data, np.ones(ROWS, bool))[0]


def plant(data, is_memorized):
    """Returns a store, and which rows have an image without a visible label.

    The original also predicts the labels of those of them that are memorized.
    """
    rng = np.random.default_rng(0)
    is_odd = rng.random(ROWS) < 0.3
    other = data.labels[rng.permutation(ROWS)]
    visible = np.where(is_odd[:, None], other, data.labels)
    features = np.concatenate([visible, rng.normal(size=(ROWS, 6))], axis=1) + 1.0
    confidence = np.where(is_odd & ~is_memorized, 0.0, 4.0)[:, None]
    logits = (confidence * (2 * data.labels - 1)).astype(np.float32)
    columns = {"fresh": features.astype(np.float32), "original_image": logits}
    is_odd &= (visible != data.labels).any(axis=1) & data.has_image
    return FeatureStore(columns, np.ones(ROWS, bool)), is_odd


def estimate(data, store, seed=0):
    sets = splits.draw_sets(data, "memorized:0.1", 0, 0.3)
    arguments = data, store, sets.retain, sets.unseen, seed
    return memorization.estimate_memorization(*arguments), sets


def test_rows_that_are_predicted_without_a_visible_label_are_memorized(data):
    is_memorized = EVERY % 2 == 0
    store, is_odd = plant(data, is_memorized)
    estimated, sets = estimate(data, store)
    is_trained = np.isin(EVERY, sets.retain)
    memorized = is_odd & is_memorized & is_trained
    others = is_odd & ~is_memorized & is_trained, ~is_odd & is_trained & data.has_image
    for rows in others:
        assert estimated.score[memorized].mean() > estimated.score[rows].mean() + 0.2
    drawn = splits.draw_sets(data, "memorized:0.05", 0, 0.3, memorization=estimated)
    assert memorized[drawn.unlearn].mean() > 0.95
    # They are hard for a model that has not seen them, and so are the non-members.
    hard, control = (
        estimated.easiness[rows[data.has_image[rows]]].mean()
        for rows in (drawn.unlearn, drawn.unseen)
    )
    unseen = estimated.easiness[data.has_image & np.isin(EVERY, sets.unseen)].mean()
    assert abs(control - hard) < 0.5 * (unseen - hard)
    assert "non-members" in memorization.describe(data, estimated, drawn)
    # Both are 0 for rows in neither set; the rest are (differences of) probabilities.
    is_used = np.isin(EVERY, [*sets.retain, *sets.unseen]) & data.has_image
    assert not np.any([x[~is_used] for x in estimated])
    assert not estimated.score[sets.unseen].any()
    assert estimated.easiness.min() >= 0 and estimated.easiness.max() <= 1
    assert np.abs(estimated.score).max() <= 1


def test_easiness_of_a_row_does_not_depend_on_its_own_label(data, planted):
    # With nearly as many features as rows, a ridge fits the labels of its own rows.
    wide = np.random.default_rng(1).normal(size=(ROWS, 900)).astype(np.float32)
    store = planted._replace(columns={**planted.columns, "fresh": wide})
    estimated, sets = estimate(data, store)
    trained, unseen = (
        estimated.easiness[rows[data.has_image[rows]]].mean()
        for rows in (sets.retain, sets.unseen)
    )
    assert abs(trained - unseen) < 0.03


def test_ridge_on_a_sample_of_many_rows_gives_similar_estimates(
    data, planted, monkeypatch
):
    every, sets = estimate(data, planted)
    monkeypatch.setattr(memorization, "MAX_ROWS", 400)
    monkeypatch.setattr("ccu_jax.evaluate.feature_store.CHUNK_ROWS", 64)
    sample, _ = estimate(data, planted)
    rows = sets.retain[data.has_image[sets.retain]]
    assert np.corrcoef(sample.score[rows], every.score[rows])[0, 1] > 0.98
    again, _ = estimate(data, planted)
    np.testing.assert_array_equal(again.score, sample.score)


def test_original_with_nan_logits_is_reported(data, planted):
    planted.columns["original_image"][:] = np.nan
    with pytest.raises(UserError, match="original: logits are not finite"):
        estimate(data, planted)
