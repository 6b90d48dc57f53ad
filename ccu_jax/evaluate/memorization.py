"""Memorization of training rows by the original, estimated from stored features.

A row is memorized as far as its label has a higher probability under a model that was
trained with the row than under one that was trained without it (Feldman 2020). The
exact value needs thousands of models. Here the first model is the original's image
view. The second is a ridge on the features of an untrained trunk, fitted to all other
rows: it sees low-level similarity and class frequencies alone. So the estimate is a
proxy. It ranks high the rows whose image says little about the label and on which the
original is nevertheless confident; some of them a well-trained model would predict
without having seen them. Near-duplicates of a row stay in the ridge.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.data.dataset import Dataset
from ccu_jax.distributed.hosts import broadcast_from_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.feature_store import CHUNK_ROWS, FeatureStore
from ccu_jax.evaluate.ridge import ridge
from ccu_jax.metrics.membership import true_probability
from ccu_jax.unlearn_sets.rules import Memorization
from ccu_jax.unlearn_sets.splits import Sets

# Features of an untrained trunk are few and simple, so a weak penalty suffices.
_RIDGE_STRENGTH = 0.3
MAX_ROWS = 16_384  # rows that the ridge is fitted to, which bounds memory
_MIN_PROBABILITY = 0.01  # scores of a ridge may lie outside of [0, 1]


def estimate_memorization(
    data: Dataset,
    store: FeatureStore,
    trained: np.ndarray,
    unseen: np.ndarray,
    seed: int,
) -> Memorization:
    """Estimates how far each row is memorized, and how easy it is to predict unseen.

    Args:
        data: labels of all N rows.
        store: of the original's features.
        trained: row numbers that the original was trained on.
        unseen: row numbers that it was not trained on.
        seed: of the rows that the ridge is fitted to if there are more than MAX_ROWS.

    Returns:
        Both `[N]`, the same in all processes: the probability of the label under the
        ridge, and the original's minus the ridge's. For several labels, probabilities
        are geometric means. 0 for rows without an image and for rows in neither set.

    Raises:
        UserError: a logit of the original is not finite.
    """
    trained, unseen = (rows[data.has_image[rows]] for rows in (trained, unseen))
    original, easiness = np.zeros((2, len(data.id)), np.float32)
    for rows in _chunks(trained):
        logits = store.columns["original_image"][rows]
        if not np.isfinite(logits).all():
            raise UserError(
                "original: logits are not finite, so memorization cannot be estimated; "
                "lower train.learning_rate"
            )
        original[rows] = true_probability(logits, data.labels[rows], data.multi_label)
    for rows, scores in _leave_one_out_scores(data, store, trained, unseen, seed):
        logits = _to_logits(scores, data.multi_label)
        easiness[rows] = true_probability(logits, data.labels[rows], data.multi_label)
    is_trained = np.isin(np.arange(len(original)), trained)
    estimates = np.stack([np.where(is_trained, original - easiness, 0), easiness])
    # Sums may differ in their last bits between machines; unlearn sets must not.
    return Memorization(*broadcast_from_primary(estimates))


def describe(data: Dataset, memorization: Memorization, sets: Sets) -> str:
    """Compares the memorization of the unlearn set with all rows and the control."""

    def mean(value_N, rows):
        return f"{value_N[rows[data.has_image[rows]]].mean():.2f}"

    trained = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    score, easiness = memorization
    return (
        "memorization (difference of probabilities): unlearn set "
        f"{mean(score, sets.unlearn)}, all {mean(score, trained)}; "
        f"probability without training on the row: unlearn set "
        f"{mean(easiness, sets.unlearn)}, all {mean(easiness, trained)}, "
        f"non-members {mean(easiness, sets.unseen)}"
    )


def _leave_one_out_scores(
    data, store, trained, unseen, seed
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows and the scores `[n, K]` of a ridge that is fitted without them."""
    fitted = trained
    if len(trained) > MAX_ROWS:
        rng = np.random.default_rng(seed)
        fitted = np.sort(rng.choice(trained, MAX_ROWS, False))
    features = store.columns["fresh"]
    # Some devices multiply in a lower precision by default.
    with jax.default_matmul_precision("highest"):
        x, y = jnp.asarray(features[fitted]), jnp.asarray(data.labels[fitted])
        predict, left_out = ridge(x, y, jnp.ones(len(x), bool), _RIDGE_STRENGTH)
        yield fitted, np.asarray(left_out)
        for rows in _chunks(np.setdiff1d(np.concatenate([trained, unseen]), fitted)):
            yield rows, np.asarray(predict(jnp.asarray(features[rows])))


def _chunks(rows) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _to_logits(scores, multi_label: bool) -> np.ndarray:
    p = np.clip(scores, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return np.log(p) - np.log1p(-p) if multi_label else np.log(p)
