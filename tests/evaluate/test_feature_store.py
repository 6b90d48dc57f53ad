"""Stores are read if they are intact and belong to the original, also after a fault."""

import json
import pathlib
import shutil
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.feature_store import count_nonzero_rows, erase_rows
from ccu_jax.evaluate.forward import pool_tokens
from ccu_jax.models import VIEWS
from ccu_jax.runs import purge
from ccu_jax.train import checkpoint
from tests import toy
from tests.evaluate.conftest import (
    COLUMNS,
    EVERY,
    IDENTITY,
    NUM_ROWS,
    contents,
    is_readable,
    read,
    write,
)

NEW_IDENTITY = {**IDENTITY, "checkpoint": "another digest"}
REMOVED = np.array([3, 17, 18, 55])
REMAINING = np.setdiff1d(EVERY, REMOVED)


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
        assert isinstance(stored, np.memmap) and stored.mode == "r"
        assert not isinstance(taken[name], np.memmap)
    outputs = problem.forward.compute_outputs(problem.params, problem.table, rows)
    for name in ("h_text", "z_text", *VIEWS):
        column = f"original_{name}" if name in VIEWS else name
        np.testing.assert_allclose(taken[column], outputs[name], atol=1e-6)
    untrained = problem.model.init(jax.random.fold_in(jax.random.key(0), 0x0FF))
    trunk = problem.model.trunk(untrained, np.asarray(problem.table["image"])[rows])
    np.testing.assert_allclose(taken["fresh"], pool_tokens(trunk), atol=1e-5)


def test_bfloat16_features_are_stored_bit_identical(tmp_path):
    settings = toy.make_config(model={"dtype": "bfloat16"})
    problem = toy.make_problem(executors.vmap(1), settings=settings)
    columns = toy.make_compute_fn(problem)(EVERY)
    assert columns["features"].dtype == jnp.bfloat16
    write(tmp_path, columns)
    for name, x in read(tmp_path).columns.items():
        assert x.dtype == columns[name].dtype
        assert x.tobytes() == columns[name].tobytes(), name
    assert erase_rows(tmp_path, REMOVED) == len(REMOVED)
    assert count_nonzero_rows(tmp_path, REMOVED) == 0


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
        changed = {**host, module: jax.tree.unflatten(tree, leaves)}
        assert not is_readable(folder, feature_store.store_identity(changed, "toy"))


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
    assert len({checkpoint.hash_tree(tree) for tree in trees}) == len(trees)
    again = {"b": jnp.asarray(x + 1), "a": jnp.asarray(x)}
    assert checkpoint.hash_tree(again) == checkpoint.hash_tree(trees[0])


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_store_with_a_damaged_column_is_not_read(folder, name):
    path = folder / f"{name}.bin"
    x = path.read_bytes()
    flipped = x[:-7] + bytes([x[-7] ^ 4]) + x[-6:]
    for content in (flipped, x[:-1], x + b"\0", b"", x):
        path.write_bytes(content)
        assert is_readable(folder) == (content == x)
    path.unlink()
    assert not is_readable(folder)


WRONG_SHAPES = (None, [56, 2, 9], [], ["56", 2, 8], [112, 8])
WRONG_COLUMNS = [
    *(None, [], {}, {"features": None}, {"features": {}}),
    *({"features": {"shape": shape, "dtype": "float32"}} for shape in WRONG_SHAPES),
    {"features": {"shape": [56, 2, 8], "dtype": "float33"}},
    {"missing": {"shape": [56, 2, 8], "dtype": "float32"}},
]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "7", "\x00\x01", "{}", json.dumps(IDENTITY)),
        *(json.dumps({**IDENTITY, "columns": columns}) for columns in WRONG_COLUMNS),
    ],
)
def test_store_with_a_damaged_description_is_not_read(folder, text):
    (folder / "about.json").write_text(text)
    assert not is_readable(folder)


def test_column_that_names_a_file_outside_the_folder_is_not_touched(folder):
    outside = folder.parent / "outside.bin"
    shutil.copy(folder / "fresh.bin", outside)
    before = outside.read_bytes()
    description = json.loads((folder / "about.json").read_text())
    description["columns"]["../outside"] = description["columns"]["fresh"]
    (folder / "about.json").write_text(json.dumps(description))
    assert not is_readable(folder)
    assert erase_rows(folder, REMOVED) == 0 and outside.read_bytes() == before


@pytest.mark.parametrize("fails_at", [0, 16, 48])
def test_failed_write_leaves_an_earlier_store_unchanged(folder, columns, fails_at):
    before = contents(folder)
    with pytest.raises(RuntimeError, match="planted"):
        write(folder, columns, NEW_IDENTITY, fails_at)
    assert contents(folder) == before and not is_readable(folder, NEW_IDENTITY)
    # The next write replaces what is left of this one.
    write(folder, columns, NEW_IDENTITY)
    assert is_readable(folder, NEW_IDENTITY) and not is_readable(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    "last_step, readable", [(0, [IDENTITY]), (1, []), (2, []), (3, [NEW_IDENTITY])]
)
def test_interrupted_write_leaves_the_old_store_or_the_new_one_or_none(
    folder, columns, monkeypatch, last_step, readable
):
    remove_tree, rename = shutil.rmtree, pathlib.Path.rename

    def finish(step):
        if step == last_step:
            raise KeyboardInterrupt

    def interrupted_rmtree(path, **kwargs):
        if path == folder:
            finish(0)
            (folder / "features.bin").unlink()
            finish(1)
        remove_tree(path, **kwargs)

    def interrupted_rename(path, target):
        finish(2)
        rename(path, target)
        finish(3)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted_rmtree)
        patch.setattr(pathlib.Path, "rename", interrupted_rename)
        with pytest.raises(KeyboardInterrupt):
            write(folder, columns, NEW_IDENTITY)
    assert [x for x in (IDENTITY, NEW_IDENTITY) if is_readable(folder, x)] == readable
    write(folder, columns)
    assert is_readable(folder) and len(list(folder.parent.iterdir())) == 1


def test_removed_rows_are_zero_on_disk_and_cannot_be_taken(folder, columns):
    mapped = read(folder)
    assert count_nonzero_rows(folder, REMOVED) == len(REMOVED)
    for rows in (REMOVED, REMOVED, EVERY[:0]):  # again, and none
        assert erase_rows(folder, rows) == len(rows)
    assert (
        count_nonzero_rows(folder, REMOVED)
        == count_nonzero_rows(folder, EVERY[:0])
        == 0
    )
    assert count_nonzero_rows(folder, REMAINING) == len(REMAINING)
    for name, x in columns.items():
        raw = np.fromfile(folder / f"{name}.bin", x.dtype).reshape(x.shape)
        assert not raw[REMOVED].view(np.uint8).any(), name
        assert raw[REMAINING].tobytes() == x[REMAINING].tobytes(), name
        assert not mapped.columns[name][REMOVED].any()
    store = read(folder)
    assert np.flatnonzero(~store.valid).tolist() == REMOVED.tolist()
    for rows in (REMOVED, REMOVED[:1], np.array([0, 1, 17])):
        with pytest.raises(ValueError, match="erased"):
            store.take(rows)
    assert len(store.take(REMAINING)["features"]) == len(REMAINING)


def test_store_with_removed_rows_is_rebuilt(tmp_path, problem):
    arguments = (problem.forward, problem.params, problem.table, problem.seed, "data")

    def open_store():
        return feature_store.open_or_build(tmp_path, *arguments, lambda *counts: None)

    open_store()
    erase_rows(tmp_path, REMOVED)
    store = read(tmp_path, feature_store.store_identity(problem.params, "data"))
    with pytest.raises(ValueError, match="erased"):
        store.as_table(problem.table)
    assert open_store().valid.all()
    assert count_nonzero_rows(tmp_path, REMOVED) == len(REMOVED)


def test_interrupted_removal_leaves_no_row_that_can_be_used(folder):
    fault = mock.patch.object(np, "memmap", side_effect=KeyboardInterrupt)
    with fault, pytest.raises(KeyboardInterrupt):
        erase_rows(folder, REMOVED)
    with pytest.raises(ValueError, match="erased"):
        read(folder).take(REMOVED[:1])
    # The values are still there; the next purge removes them.
    assert count_nonzero_rows(folder, REMOVED) == len(REMOVED)
    erase_rows(folder, REMOVED)
    assert count_nonzero_rows(folder, REMOVED) == 0


@pytest.mark.parametrize("name", ["about.json", "there.bin", "features.bin"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_removing_rows_deletes_a_damaged_store(folder, name, damage):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[:20])
    for _ in range(2):  # from the second time on, there is no store
        assert erase_rows(folder, REMOVED) == 0
        assert not folder.exists() and count_nonzero_rows(folder, REMOVED) == 0


def test_purge_reaches_the_stores_of_all_seeds(tmp_path, columns):
    folders = [tmp_path / f"checkpoints/original-{n}/features" for n in range(4)]
    for folder in folders[:3]:
        write(folder, columns)
    # Writing was interrupted: for the first time, and while a store was replaced.
    folders[1].rename(folders[1].with_name("features.new"))
    shutil.copytree(folders[2], folders[2].with_name("features.new"))
    data = types.SimpleNamespace(id=np.array([f"row{row}" for row in EVERY]))
    ctx = types.SimpleNamespace(workdir=tmp_path, data=data)
    ids = {f"row{row}" for row in REMOVED}
    assert purge._purge_features(ctx, ids) == 2 * len(REMOVED)
    assert sorted(tmp_path.rglob("features")) == folders[:3:2]
    assert not list(tmp_path.rglob("features.new"))
    for folder in folders[:3:2]:
        assert count_nonzero_rows(folder, EVERY) == NUM_ROWS - len(REMOVED)
