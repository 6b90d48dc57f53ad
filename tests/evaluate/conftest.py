"""Feature stores of a toy problem."""

import pytest

from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from tests import toy
from tests.evaluate.stores import EVERY, write


@pytest.fixture(scope="module")
def problem():
    return toy.make_problem(executors.vmap(2))


@pytest.fixture(scope="module")
def compute(problem):
    return feature_store.make_compute_fn(
        problem.forward, problem.params, problem.table, problem.seed
    )


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
