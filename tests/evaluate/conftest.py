"""Feature stores of a toy problem."""

import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.models import VIEWS
from tests import toy

COLUMNS = {"features", "h_text", "z_text", "fresh", *(f"original_{v}" for v in VIEWS)}
NUM_ROWS = 56
EVERY = np.arange(NUM_ROWS)
IDENTITY = {"checkpoint": "a digest", "fingerprint": "a fingerprint"}


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


def record_calls(model, names, calls):
    """Returns the model with functions that append their names to a list."""

    def record(name):
        def call(*args, **kwargs):
            calls.append(name)
            return getattr(model, name)(*args, **kwargs)

        return call

    return model._replace(**{name: record(name) for name in names})


@pytest.fixture(scope="module")
def problem():
    return toy.make_problem(executors.vmap(2))


@pytest.fixture(scope="module")
def compute(problem):
    return toy.make_compute_fn(problem)


@pytest.fixture(scope="module")
def columns(compute):
    return compute(EVERY)


@pytest.fixture(autouse=True)
def _four_chunks(monkeypatch):
    monkeypatch.setattr(feature_store, "CHUNK_ROWS", 16)


@pytest.fixture
def folder(tmp_path, columns):
    """The folder of a complete store."""
    folder = tmp_path / "original-0" / "features"
    write(folder, columns)
    return folder
