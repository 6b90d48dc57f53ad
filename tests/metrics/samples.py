"""Random inputs for the tests of metrics."""

from typing import TypeVar

import numpy as np
import pytest

from ccu_jax.metrics.roc import Signals

EXACT = 1e-9
TIES = pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
T = TypeVar("T")


def require(value: T | None) -> T:
    """Returns a measurement that must not be None."""
    assert value is not None
    return value


def compute_coverage(sample, truth, seeds=300) -> float:
    """Returns how often the interval `sample(rng)` contains the truth."""
    intervals = [require(sample(np.random.default_rng(seed))) for seed in range(seeds)]
    return float(np.mean([x.low <= truth <= x.high for x in intervals]))


def make_signals(seed=0, shift=0.5, members=60, nonmembers=80, ties=False) -> Signals:
    """Returns unit normal signals whose means are `shift` apart."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=members) + shift, rng.normal(size=nonmembers)
    return Signals(np.round(2 * x), np.round(2 * y)) if ties else Signals(x, y)


def make_logits(seed=0, rows=80, classes=5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(rows, classes)).astype(np.float32)


def make_labels(multi_label, seed=100, rows=80, classes=5) -> np.ndarray:
    """Returns labels `[N, K]`; no row has the last class."""
    rng = np.random.default_rng(seed)
    if not multi_label:
        return np.eye(classes)[rng.integers(classes - 1, size=rows)]
    labels = (rng.random((rows, classes)) < 0.3).astype(float)
    labels[:, -1] = 0
    return labels
