"""Realistic conditions: rows without a part, noisy rows, rows in an order.

They befall rows that could be trained on; validation and test rows stay as they are, so
that scores can be compared. Pure functions of the data set and the settings.
"""

from typing import Any

import numpy as np

from ccu_jax.config.schema import Corruptions

DROPPED = "dropped"  # the split of rows that have lost their label


def apply(data, config: Corruptions):
    """The data set under these conditions, and what they came to.

    Args:
        data: a `ccu_jax.data.Dataset`.
        config: shares in [0, 1] of the training rows.

    Returns:
        The data set, and `{condition: {"share": asked for, "rows": of how many}}` with
        `order`, `window` and `seed` where they matter; empty when all is as it was.
    """
    told: dict[str, Any] = {}
    train = np.flatnonzero(data.split == "train")
    # Noise first: a text that a row has lost cannot go to another one.
    for number, (name, change) in enumerate(_CHANGES.items()):
        if asked := getattr(config, name):
            rng = np.random.default_rng([config.seed, number])
            data, rows = change(data, train, round(asked * len(train)), rng)
            told[name] = {"share": asked, "rows": rows}
    if config.order != "shuffled":
        told |= {"order": config.order, "window": config.window}
    if told:
        told["seed"] = config.seed
    return data, told


def arrival(data, order: str) -> np.ndarray | None:
    """The place `[N]` of each row in the order of training; None: in no order."""
    if order == "stored":
        return np.arange(len(data.id))
    if order == "by_class":
        place = np.empty(len(data.id), np.int64)
        place[np.argsort(data.labels.argmax(axis=1), kind="stable")] = np.arange(
            len(place)
        )
        return place
    return None


def _some(rng, rows: np.ndarray, count: int) -> np.ndarray:
    return np.sort(rng.permutation(rows)[:count])


def _noisy_labels(data, train, count, rng):
    """Labels of a random other training row that differ from the row's own."""
    chosen, labels = _some(rng, train, count), data.labels.copy()
    left = chosen
    for _ in range(100):  # by then all that can be have been changed
        donors = rng.choice(train, len(left))
        labels[left] = data.labels[donors]
        left = left[(labels[left] == data.labels[left]).all(axis=1)]
    return data._replace(labels=labels), len(chosen) - len(left)


def _noisy_text(data, train, count, rng):
    """Texts that go round among the chosen rows: each row gets another one's."""
    chosen = rng.permutation(_some(rng, train[data.has_text[train]], count))
    if len(chosen) < 2:
        return data, 0
    text = np.array(data.text)
    text[chosen] = data.text[np.roll(chosen, 1)]
    return data._replace(text=text), len(chosen)


def _missing_image(data, train, count, rng):
    chosen = _some(rng, _whole(data, train), count)
    return _without(data, "has_image", chosen), len(chosen)


def _missing_text(data, train, count, rng):
    chosen = _some(rng, _whole(data, train), count)
    return _without(data, "has_text", chosen), len(chosen)


def _incomplete(data, train, count, rng):
    """One of picture, text and label is lost; a row's last one of the first two not."""
    chosen = _some(rng, train, count)
    lost = rng.integers(3, size=len(chosen))
    whole = data.has_image[chosen] & data.has_text[chosen]
    data = _without(data, "has_image", chosen[(lost == 0) & whole])
    data = _without(data, "has_text", chosen[(lost == 1) & whole])
    split = data.split.astype(f"<U{max(len(DROPPED), data.split.itemsize // 4)}")
    split[chosen[(lost == 2) | ~whole]] = DROPPED
    return data._replace(split=split), len(chosen)


def _whole(data, rows):
    return rows[data.has_image[rows] & data.has_text[rows]]


def _without(data, name: str, rows: np.ndarray):
    there = getattr(data, name).copy()
    there[rows] = False
    return data._replace(**{name: there})


_CHANGES = {
    "noisy_labels": _noisy_labels,
    "noisy_text": _noisy_text,
    "missing_image": _missing_image,
    "missing_text": _missing_text,
    "incomplete": _incomplete,
}
