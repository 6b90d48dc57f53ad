"""What an original has memorised of its training rows, by its stored features.

Feldman (2020) calls a row memorised as far as a model that was trained with it gives
its label a higher probability than one trained without it. That asks for thousands of
models. Here the model that has seen the row is the original, in the image's view; the
one that has not is a ridge on features of a trunk that never learned anything, fitted
to all other rows. That one is weak: it knows plain likeness and how common a class is.
So the difference is a proxy. It ranks rows whose picture tells little of the label and
which the original is sure of nevertheless, and among these it cannot tell what a good
model would have learned from other rows. A row's near-duplicates stay in the ridge.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.hosts import broadcast_from_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.feature_store import CHUNK_ROWS, FeatureStore
from ccu_jax.evaluate.ridge import ridge
from ccu_jax.metrics import membership
from ccu_jax.unlearn_sets.rules import Memorization
from ccu_jax.unlearn_sets.splits import Sets

# Features of an untrained trunk are few and plain: they bear a weak ridge.
RIDGE = 0.3
MAX_ROWS = 16_384  # rows that the ridge is fitted to: memory is bounded
_FLOOR = 0.01  # a ridge's scores are no probabilities, and may lie below 0


def estimate_memorization(
    data, store: FeatureStore, trained, apart, seed: int
) -> Memorization:
    """What the original has memorised, and how easy rows are for the ridge.

    Both are probabilities of the truth, or differences of these; of several labels
    the geometric mean. Rows without a picture, and those that are in neither set, have
    zeros. All processes get the same.

    Args:
        data: a `ccu_jax.data.Dataset`.
        store: of the original's features.
        trained: numbers of the rows that the original was trained on.
        apart: those of rows that it has not seen.
        seed: of the rows that the ridge is fitted to, where there are more than MOST.

    Raises:
        UserError: the original says no numbers.
    """
    trained, apart = (rows[data.has_image[rows]] for rows in (trained, apart))
    said, ease = np.zeros((2, len(data.id)), np.float32)
    for rows in _chunks(trained):
        logits = store.columns["original_image"][rows]
        if not np.isfinite(logits).all():
            raise UserError(
                "the original's training has failed, it says no numbers: nothing can "
                "be told of what it has memorised; lower train.learning_rate"
            )
        said[rows] = _probability(logits, data.labels[rows], data.multi_label)
    for rows, scores in _blind(data, store, trained, apart, seed):
        logits = _logits(scores, data.multi_label)
        ease[rows] = _probability(logits, data.labels[rows], data.multi_label)
    seen = np.isin(np.arange(len(said)), trained)
    # Sums may differ in their last bits from machine to machine, sets may not.
    return Memorization(
        *broadcast_from_primary(np.stack([np.where(seen, said - ease, 0), ease]))
    )


def describe(data, known: Memorization, sets: Sets) -> str:
    """How much of the forgotten rows was memorised, and how like them the control is.

    Args:
        data: a `ccu_jax.data.Dataset`.
        known: of the original.
        sets: that were drawn by it.
    """

    def mean(value_N, rows):
        return f"{value_N[rows[data.has_image[rows]]].mean():.2f}"

    every = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    return (
        "memorised, as a difference of probabilities: forgotten rows "
        f"{mean(known.score, sets.unlearn)}, all {mean(known.score, every)}; "
        "probability without having seen the row: forgotten rows "
        f"{mean(known.easiness, sets.unlearn)}, all {mean(known.easiness, every)}, the control "
        f"{mean(known.easiness, sets.unseen)}"
    )


def _blind(data, store, trained, apart, seed):
    """Yields rows and the scores `[n, K]` of a ridge that was fitted without them."""
    fitted = trained
    if len(trained) > MAX_ROWS:
        fitted = np.sort(np.random.default_rng(seed).choice(trained, MAX_ROWS, False))
    # In full precision, whatever the device's products are by default.
    with jax.default_matmul_precision("highest"):
        x, y = (jnp.asarray(of[fitted]) for of in (store.columns["fresh"], data.labels))
        predict, left_out = ridge(x, y, jnp.ones(len(x), bool), RIDGE)
        yield fitted, np.asarray(left_out)
        for rows in _chunks(np.setdiff1d(np.concatenate([trained, apart]), fitted)):
            yield rows, np.asarray(predict(jnp.asarray(store.columns["fresh"][rows])))


def _chunks(rows):
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _logits(scores, multi_label):
    """A ridge's scores near 0..1 as logits of the same kind as a model's."""
    p = np.clip(scores, _FLOOR, 1 - _FLOOR)
    return np.log(p) - np.log1p(-p) if multi_label else np.log(p)


def _probability(logits, labels, multi_label):
    """Of the true class, or the geometric mean of those of all labels' values."""
    sure = membership.log_likelihood(logits, labels, multi_label)
    return np.exp(sure / (labels.shape[1] if multi_label else 1))
