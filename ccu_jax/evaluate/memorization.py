"""Memorization of training rows by the original, estimated from stored features.

The memorization of a row is the probability of its label under a model that was trained
with the row, minus that under a model that was trained without it (Feldman 2020). The
exact value needs thousands of models. Here the first model is the original's image
view. The second is a ridge regression on the features of an untrained trunk, fitted to
all other rows, near-duplicates included: it uses only low-level similarity and class
frequencies. So the estimate is a proxy: it is high for rows whose label is hard to
predict from the image and on which the original is nevertheless confident, even if a
well-trained model would predict some of them without having seen them.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.data.dataset import Dataset
from ccu_jax.distributed.hosts import broadcast_from_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.feature_store import FeatureStore, iterate_chunks
from ccu_jax.evaluate.ridge import fit_ridge
from ccu_jax.metrics.membership import true_probability
from ccu_jax.unlearn_sets.rules import Memorization
from ccu_jax.unlearn_sets.splits import Sets

# Features of an untrained trunk are few and simple, so a weak penalty suffices.
_RIDGE_STRENGTH = 0.3
MAX_ROWS = 16_384  # rows that the ridge is fitted to, which bounds memory
_MIN_PROBABILITY = 0.01  # scores of a ridge may lie outside of [0, 1]


def estimate_memorization(
    data: Dataset, store: FeatureStore, train: np.ndarray, unseen: np.ndarray, seed: int
) -> Memorization:
    """Estimates how strongly each row is memorized and how easy it is to predict.

    `train` and `unseen` are the rows that the original was and was not trained on;
    `seed` samples the rows that the ridge is fitted to if there are too many.

    Returns:
        Two arrays `[N]`, identical in all processes: the label's probability under the
        original minus that under the ridge, and that under the ridge. Multi-label
        probabilities are geometric means over labels. 0 for rows without an image and
        for rows in neither set.

    Raises UserError if a logit of the original is not finite.
    """
    train, unseen = (rows[data.has_image[rows]] for rows in (train, unseen))
    original, easiness = np.zeros((2, len(data.id)), np.float32)
    for rows in iterate_chunks(train):
        logits = store.columns["original_image"][rows]
        if not np.isfinite(logits).all():
            raise UserError(
                "original: logits are not finite, so memorization cannot be estimated; "
                "lower train.learning_rate"
            )
        original[rows] = true_probability(logits, data.labels[rows], data.multi_label)
    for rows, scores in _predict_left_out_rows(data, store, train, unseen, seed):
        logits = _to_logits(scores, data.multi_label)
        easiness[rows] = true_probability(logits, data.labels[rows], data.multi_label)
    is_trained = np.isin(np.arange(len(original)), train)
    estimates = np.stack([np.where(is_trained, original - easiness, 0), easiness])
    # Sums may differ in their last bits between machines; unlearn sets must not.
    return Memorization(*broadcast_from_primary(estimates))


def describe(data: Dataset, memorization: Memorization, sets: Sets) -> str:
    """Describes the mean memorization of the unlearn set and of other rows."""

    def mean(value_N, rows):
        return f"{value_N[rows[data.has_image[rows]]].mean():.2f}"

    train = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    score, easiness = memorization
    return (
        "memorization (difference of probabilities): unlearn set "
        f"{mean(score, sets.unlearn)}, all {mean(score, train)}; "
        f"probability without training on the row: unlearn set "
        f"{mean(easiness, sets.unlearn)}, all {mean(easiness, train)}, "
        f"non-members {mean(easiness, sets.unseen)}"
    )


def _predict_left_out_rows(
    data, store, train, unseen, seed
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows and the scores `[n, K]` of a ridge that is fitted without them."""
    sample = train
    if len(train) > MAX_ROWS:
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(train, MAX_ROWS, False))
    features = store.columns["fresh"]
    # Some devices multiply in a lower precision by default.
    with jax.default_matmul_precision("highest"):
        x, y = jnp.asarray(features[sample]), jnp.asarray(data.labels[sample])
        predict, left_out_scores = fit_ridge(
            x, y, jnp.ones(len(x), bool), _RIDGE_STRENGTH
        )
        yield sample, np.asarray(left_out_scores)
        rest = np.setdiff1d(np.concatenate([train, unseen]), sample)
        for rows in iterate_chunks(rest):
            yield rows, np.asarray(predict(jnp.asarray(features[rows])))


def _to_logits(scores, multi_label: bool) -> np.ndarray:
    p = np.clip(scores, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return np.log(p) - np.log1p(-p) if multi_label else np.log(p)
