"""Corruptions of the training rows: missing modalities, noisy rows, ordered streams.

Validation and test rows stay unchanged, so that scores are comparable. The result is
a pure function of the data set and the settings.
"""

import functools
from typing import Any

import numpy as np

from ccu_jax.config.schema import Corruptions
from ccu_jax.data.dataset import Dataset

DROPPED = "dropped"  # the split of rows that lost their label


def apply(data: Dataset, config: Corruptions) -> tuple[Dataset, dict[str, Any]]:
    """Applies the corruptions to the training rows.

    Args:
        data: the prepared data set; it is not modified.
        config: fractions of the training rows, in [0, 1], and the training order.

    Returns:
        The corrupted data set and a record: for each corruption {"share": the requested
        fraction, "rows": the number of corrupted rows}, and `order`, `window` and
        `seed` where they apply. The record is empty if no corruption was requested.
    """
    record: dict[str, Any] = {}
    train = np.flatnonzero(data.split == "train")
    # Noise comes first: a text that a row has lost cannot be moved to another row.
    for position, (name, corrupt) in enumerate(_CORRUPTIONS.items()):
        if fraction := getattr(config, name):
            rng = np.random.default_rng([config.seed, position])
            count = round(fraction * len(train))
            data, num_rows = corrupt(data, train, count, rng)
            record[name] = {"share": fraction, "rows": num_rows}
    if config.order != "shuffled":
        record |= {"order": config.order, "window": config.window}
    if record:
        record["seed"] = config.seed
    return data, record


def stream_positions(data: Dataset, order: str) -> np.ndarray | None:
    """Returns the position of each row in the training stream.

    The result is int [N] for the orders "stored" and "by_class" (by the first label),
    and None for "shuffled".
    """
    if order == "stored":
        return np.arange(len(data.id))
    if order == "by_class":
        positions = np.empty(len(data.id), np.int64)
        rows = np.argsort(data.labels.argmax(axis=1), kind="stable")
        positions[rows] = np.arange(len(rows))
        return positions
    return None


def _sample_rows(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    return np.sort(rng.permutation(rows)[:count])


def _add_label_noise(
    data: Dataset, train: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[Dataset, int]:
    """Gives random rows other rows' labels; also returns the number of changed rows."""
    chosen, labels = _sample_rows(rng, train, count), data.labels.copy()
    unchanged = chosen
    for _ in range(100):  # enough unless all rows have the same labels
        donors = rng.choice(train, len(unchanged))
        labels[unchanged] = data.labels[donors]
        is_same = (labels[unchanged] == data.labels[unchanged]).all(axis=1)
        unchanged = unchanged[is_same]
    return data._replace(labels=labels), len(chosen) - len(unchanged)


def _add_text_noise(
    data: Dataset, train: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[Dataset, int]:
    """Permutes the texts of random rows; also returns the number of these rows."""
    chosen = rng.permutation(_sample_rows(rng, train[data.has_text[train]], count))
    if len(chosen) < 2:
        return data, 0
    text = np.array(data.text)
    text[chosen] = data.text[np.roll(chosen, 1)]
    return data._replace(text=text), len(chosen)


def _drop_modality(
    field: str,
    data: Dataset,
    train: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> tuple[Dataset, int]:
    """Clears the `has_` column `field` of random rows; also returns their number."""
    chosen = _sample_rows(rng, train[_has_both_modalities(data, train)], count)
    return _clear_modality(data, field, chosen), len(chosen)


def _drop_any(
    data: Dataset, train: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[Dataset, int]:
    """Drops the image, text or label of random rows; also returns their number.

    Each row keeps at least one modality; a row without label leaves the train split.
    """
    chosen = _sample_rows(rng, train, count)
    dropped = rng.integers(3, size=len(chosen))  # 0: image, 1: text, 2: label
    has_both = _has_both_modalities(data, chosen)
    data = _clear_modality(data, "has_image", chosen[(dropped == 0) & has_both])
    data = _clear_modality(data, "has_text", chosen[(dropped == 1) & has_both])
    split = data.split.astype(f"<U{max(len(DROPPED), data.split.itemsize // 4)}")
    split[chosen[(dropped == 2) | ~has_both]] = DROPPED
    return data._replace(split=split), len(chosen)


def _has_both_modalities(data: Dataset, rows: np.ndarray) -> np.ndarray:
    return data.has_image[rows] & data.has_text[rows]


def _clear_modality(data: Dataset, field: str, rows: np.ndarray) -> Dataset:
    has_modality = getattr(data, field).copy()
    has_modality[rows] = False
    return data._replace(**{field: has_modality})


# The random numbers of a corruption are seeded by its position in this table.
_CORRUPTIONS = {
    "noisy_labels": _add_label_noise,
    "noisy_text": _add_text_noise,
    "missing_image": functools.partial(_drop_modality, "has_image"),
    "missing_text": functools.partial(_drop_modality, "has_text"),
    "incomplete": _drop_any,
}
