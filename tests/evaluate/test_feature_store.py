"""A feature store is read only if it is intact and belongs to the original."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.feature_store import count_remaining, remove_rows
from ccu_jax.evaluate.forward import pool_tokens
from ccu_jax.models import VIEWS
from ccu_jax.train import checkpoint
from tests import toy
from tests.evaluate.stores import (
    COLUMNS,
    EVERY,
    IDENTITY,
    NUM_ROWS,
    REMOVED,
    is_readable,
    read,
    write,
)

# --- columns --------------------------------------------------------------------------


def test_stored_columns_are_the_computed_ones(tmp_path, problem, compute, columns):
    progress = []
    feature_store.write(
        tmp_path, IDENTITY, NUM_ROWS, compute, lambda *counts: progress.append(counts)
    )
    assert progress == [(16, 56), (32, 56), (48, 56), (56, 56)]
    store = read(tmp_path)
    assert set(store.columns) == COLUMNS == set(columns)
    assert store.valid.all() and len(store.valid) == NUM_ROWS
    rows = np.array([5, 0, 55, 5, 17, 33])
    taken = store.take(rows)
    for name, x in columns.items():
        stored = store.columns[name]
        assert (stored.shape, stored.dtype) == (x.shape, x.dtype)
        # Sums are in another order, because chunks are other batches.
        np.testing.assert_allclose(stored, x, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(taken[name], np.asarray(stored)[rows])
    outputs = problem.forward.outputs(problem.params, problem.table, rows)
    stored_outputs = {"h_text": "h_text", "z_text": "z_text"}
    stored_outputs |= {f"original_{view}": view for view in VIEWS}
    for column, name in stored_outputs.items():
        np.testing.assert_allclose(taken[column], outputs[name], atol=1e-6)
    untrained = feature_store.init_untrained(problem.model, problem.seed)
    trunk = problem.model.trunk(untrained, np.asarray(problem.table["image"])[rows])
    np.testing.assert_allclose(taken["fresh"], pool_tokens(trunk), atol=1e-5)


def test_columns_are_memory_mapped_and_read_only(folder):
    store = read(folder)
    for x in store.columns.values():
        assert isinstance(x, np.memmap) and x.mode == "r"
        with pytest.raises(ValueError, match="read-only"):
            x[0] = 0
    for x in store.take(EVERY[:3]).values():
        assert not isinstance(x, np.memmap)
        x[:] = 0
    assert count_remaining(folder, EVERY) == NUM_ROWS


def test_bfloat16_features_are_stored_bit_identical(tmp_path):
    settings = toy.make_config(model={"dtype": "bfloat16"})
    problem = toy.make_problem(executors.vmap(1), settings=settings)
    compute = feature_store.make_compute_fn(
        problem.forward, problem.params, problem.table, 0
    )
    columns = compute(EVERY)
    assert columns["features"].dtype == jnp.bfloat16
    write(tmp_path, columns)
    for name, x in read(tmp_path).columns.items():
        assert x.dtype == columns[name].dtype
        assert x.tobytes() == columns[name].tobytes(), name
    assert remove_rows(tmp_path, REMOVED) == len(REMOVED)
    assert count_remaining(tmp_path, REMOVED) == 0


# --- identity and damage --------------------------------------------------------------


def test_store_belongs_to_one_checkpoint_and_one_version_of_the_data(
    problem, folder, columns
):
    identity = feature_store.store_identity(problem.params, "toy")
    write(folder, columns, identity)
    assert not is_readable(folder, {**identity, "fingerprint": "other data"})
    host = jax.device_get(problem.params)
    assert is_readable(folder, feature_store.store_identity(host, "toy"))
    for module in host:
        leaves, tree = jax.tree.flatten(host[module])
        leaves[0] = np.nextafter(leaves[0], np.float32(9))
        other = {**host, module: jax.tree.unflatten(tree, leaves)}
        assert not is_readable(folder, feature_store.store_identity(other, "toy"))


def test_digest_of_parameters_depends_on_names_dtypes_and_shapes():
    x = np.arange(6, dtype=np.float32)
    trees = (
        {"a": x, "b": x + 1},
        {"a": x + 1, "b": x},
        {"a": x, "c": x + 1},
        {"a": x.reshape(2, 3), "b": x + 1},
        {"a": x.astype(np.float64), "b": x + 1},
        {"a": x},
    )
    assert len({checkpoint.digest(tree) for tree in trees}) == len(trees)
    again = {"b": jnp.asarray(x + 1), "a": jnp.asarray(x)}
    assert checkpoint.digest(again) == checkpoint.digest(trees[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[:-7] + bytes([x[-7] ^ 4]) + x[-6:],
        lambda x: x[:-1],
        lambda x: x + b"\0",
        lambda x: b"",
        None,
    ],
    ids=["flipped bit", "shorter", "longer", "empty", "missing"],
)
def test_store_with_a_damaged_column_is_not_read(folder, damage):
    for name in sorted(COLUMNS):
        path = folder / f"{name}.bin"
        content = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(content))
        assert not is_readable(folder), name
        path.write_bytes(content)
        assert is_readable(folder)


@pytest.mark.parametrize(
    "described",
    [
        None,
        [],
        {},
        {"features": None},
        {"features": {}},
        {"features": {"shape": None, "dtype": "float32"}},
        {"features": {"shape": [56, 2, 8], "dtype": "float33"}},
        {"features": {"shape": [56, 2, 9], "dtype": "float32"}},
        {"features": {"shape": [], "dtype": "float32"}},
        {"features": {"shape": ["56", 2, 8], "dtype": "float32"}},
        {"features": {"shape": [112, 8], "dtype": "float32"}},
        {"missing": {"shape": [56, 2, 8], "dtype": "float32"}},
    ],
)
def test_store_with_wrong_columns_in_its_description_is_not_read(folder, described):
    text = json.dumps({**IDENTITY, "columns": described})
    (folder / "about.json").write_text(text)
    assert not is_readable(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "\x00\x01", "{}", json.dumps(IDENTITY)]
)
def test_store_with_a_damaged_description_is_not_read(folder, text):
    (folder / "about.json").write_text(text)
    assert not is_readable(folder)


def test_missing_store_is_not_read(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert not is_readable(folder)


def test_column_that_names_a_file_outside_the_folder_is_not_touched(folder):
    outside = folder.parent / "outside.bin"
    shutil.copy(folder / "fresh.bin", outside)
    before = outside.read_bytes()
    description = json.loads((folder / "about.json").read_text())
    description["columns"]["../outside"] = description["columns"]["fresh"]
    (folder / "about.json").write_text(json.dumps(description))
    assert not is_readable(folder)
    assert remove_rows(folder, REMOVED) == 0 and outside.read_bytes() == before
