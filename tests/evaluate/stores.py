"""Writes and reads feature stores of toy problems."""

import numpy as np

from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.models import VIEWS

COLUMNS = {"features", "h_text", "z_text", "fresh", *(f"original_{v}" for v in VIEWS)}
NUM_ROWS = 56
EVERY = np.arange(NUM_ROWS)
REMOVED = np.array([3, 17, 18, 55])
KEPT = np.setdiff1d(EVERY, REMOVED)
IDENTITY = {"checkpoint": "a digest", "fingerprint": "a fingerprint"}
OTHER = {**IDENTITY, "checkpoint": "another digest"}


def write(folder, columns, identity=IDENTITY, fails_at=None):
    def compute(rows):
        if rows[0] == fails_at:
            raise RuntimeError("planted")
        return {name: x[rows] for name, x in columns.items()}

    feature_store.write(folder, identity, NUM_ROWS, compute, lambda *counts: None)


def read(folder, identity=IDENTITY) -> FeatureStore:
    store = feature_store.read(folder, identity)
    assert store is not None
    return store


def is_readable(folder, identity=IDENTITY):
    return feature_store.read(folder, identity) is not None


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
