"""Random inputs for the tests of metrics."""

from typing import TypeVar

import numpy as np

from ccu_jax.metrics.roc import Signals

T = TypeVar("T")


def measured(value: T | None) -> T:
    """Returns a measurement that must not be None."""
    assert value is not None
    return value


def normal_signals(
    seed: int = 0,
    shift: float = 0.5,
    members: int = 60,
    nonmembers: int = 80,
    ties: bool = False,
) -> Signals:
    """Returns unit normal signals whose means are `shift` apart."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=members) + shift, rng.normal(size=nonmembers)
    return Signals(np.round(2 * x), np.round(2 * y)) if ties else Signals(x, y)


def random_logits(seed: int = 0, rows: int = 80, classes: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(rows, classes)).astype(np.float32)


def random_labels(
    multi_label: bool, seed: int = 100, rows: int = 80, classes: int = 5
) -> np.ndarray:
    """Returns labels `[N, K]`; no row has the last class."""
    rng = np.random.default_rng(seed)
    if not multi_label:
        return np.eye(classes)[rng.integers(classes - 1, size=rows)]
    labels = (rng.random((rows, classes)) < 0.3).astype(float)
    labels[:, -1] = 0
    return labels
