"""Interrupted writes and removals leave no store that could be misread."""

import errno
import io
import pathlib
import shutil
import types

import numpy as np
import pytest

from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.feature_store import count_remaining, remove_rows
from ccu_jax.runs import purge
from tests.evaluate.stores import (
    EVERY,
    IDENTITY,
    KEPT,
    NUM_ROWS,
    OTHER,
    REMOVED,
    contents,
    is_readable,
    read,
    write,
)

# --- interrupted writes ---------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("fails_at", [0, 16, 48])
def test_failed_write_leaves_an_earlier_store_unchanged(
    tmp_path, columns, is_first, fails_at
):
    folder = tmp_path / "features"
    if not is_first:
        write(folder, columns)
    before = {} if is_first else contents(folder)
    with pytest.raises(RuntimeError, match="planted"):
        write(folder, columns, OTHER, fails_at)
    assert not is_readable(folder, OTHER)
    assert (contents(folder) if folder.exists() else {}) == before
    # The next write replaces what is left of this one.
    write(folder, columns, OTHER)
    assert is_readable(folder, OTHER) and not is_readable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_full_disk_is_an_error_that_leaves_an_earlier_store_unchanged(
    folder, columns, monkeypatch
):
    before, open_file = contents(folder), pathlib.Path.open

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path, *args, **kwargs):
        return Full() if path.suffix == ".bin" else open_file(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_full)
        with pytest.raises(OSError, match="No space"):
            write(folder, columns)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "moment, readable",
    [
        ("before removing the old store", [IDENTITY]),
        ("while removing the old store", []),
        ("before renaming the new store", []),
        ("after renaming the new store", [OTHER]),
    ],
)
def test_interrupted_write_leaves_the_old_store_or_the_new_one_or_none(
    folder, columns, monkeypatch, moment, readable
):
    remove_tree, rename = shutil.rmtree, pathlib.Path.rename

    def interrupt(now):
        if now == moment:
            raise KeyboardInterrupt

    def interrupted_rmtree(path, **kwargs):
        if path == folder:
            interrupt("before removing the old store")
            (folder / "features.bin").unlink()
            interrupt("while removing the old store")
        remove_tree(path, **kwargs)

    def interrupted_rename(path, target):
        interrupt("before renaming the new store")
        rename(path, target)
        interrupt("after renaming the new store")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted_rmtree)
        patch.setattr(pathlib.Path, "rename", interrupted_rename)
        with pytest.raises(KeyboardInterrupt):
            write(folder, columns, OTHER)
    assert [x for x in (IDENTITY, OTHER) if is_readable(folder, x)] == readable
    write(folder, columns)
    assert is_readable(folder) and len(list(folder.parent.iterdir())) == 1


# --- removed rows ---------------------------------------------------------------------


def test_removed_rows_are_zero_on_disk_and_cannot_be_taken(folder, columns):
    mapped = read(folder)
    assert count_remaining(folder, REMOVED) == len(REMOVED)
    for rows in (REMOVED, REMOVED, EVERY[:0]):  # again, and none
        assert remove_rows(folder, rows) == len(rows)
    assert count_remaining(folder, REMOVED) == count_remaining(folder, EVERY[:0]) == 0
    assert count_remaining(folder, KEPT) == len(KEPT)
    for name, x in columns.items():
        raw = np.fromfile(folder / f"{name}.bin", x.dtype).reshape(x.shape)
        assert not raw[REMOVED].view(np.uint8).any(), name
        assert raw[KEPT].tobytes() == x[KEPT].tobytes(), name
        assert not mapped.columns[name][REMOVED].any()
    store = read(folder)
    assert np.flatnonzero(~store.valid).tolist() == REMOVED.tolist()
    for rows in (REMOVED, REMOVED[:1], np.array([0, 1, 17])):
        with pytest.raises(ValueError, match="removed"):
            store.take(rows)
    assert len(store.take(KEPT)["features"]) == len(KEPT)


def test_store_with_removed_rows_is_rebuilt(tmp_path, problem):
    arguments = (problem.forward, problem.params, problem.table, problem.seed, "data")

    def open_store():
        return feature_store.open_or_build(tmp_path, *arguments, lambda *counts: None)

    open_store()
    remove_rows(tmp_path, REMOVED)
    store = read(tmp_path, feature_store.store_identity(problem.params, "data"))
    with pytest.raises(ValueError, match="removed"):
        store.as_table(problem.table)
    assert open_store().valid.all()
    assert count_remaining(tmp_path, REMOVED) == len(REMOVED)


def test_removing_rows_of_a_missing_store_does_nothing(tmp_path):
    assert remove_rows(tmp_path / "features", REMOVED) == 0
    assert count_remaining(tmp_path / "features", REMOVED) == 0
    assert not list(tmp_path.iterdir())


def test_removing_rows_deletes_an_unfinished_store(folder, columns):
    with pytest.raises(RuntimeError, match="planted"):
        write(folder, columns, fails_at=16)
    unfinished = folder.with_name("features.new")
    assert unfinished.exists()
    remove_rows(folder, REMOVED)
    assert not unfinished.exists()


def test_interrupted_removal_leaves_no_row_that_can_be_used(folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.np, "memmap", interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_rows(folder, REMOVED)
    with pytest.raises(ValueError, match="removed"):
        read(folder).take(REMOVED[:1])
    # The values are still there; the next purge removes them.
    assert count_remaining(folder, REMOVED) == len(REMOVED)
    remove_rows(folder, REMOVED)
    assert count_remaining(folder, REMOVED) == 0


@pytest.mark.parametrize("name", ["about.json", "there.bin", "features.bin"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_removing_rows_deletes_a_damaged_store(folder, name, damage):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "truncated":
        (folder / name).write_bytes(content[:20])
    assert remove_rows(folder, REMOVED) == 0
    assert not folder.exists() and count_remaining(folder, REMOVED) == 0


def test_purge_reaches_the_stores_of_all_seeds(tmp_path, columns):
    folders = [
        tmp_path / "checkpoints" / f"original-{n}" / "features" for n in range(4)
    ]
    for folder in folders[:3]:
        write(folder, columns)
    # Writing was interrupted: for the first time, and while a store was replaced.
    folders[1].rename(folders[1].with_name("features.new"))
    shutil.copytree(folders[2], folders[2].with_name("features.new"))
    data = types.SimpleNamespace(id=np.array([f"row{row}" for row in EVERY]))
    ctx = types.SimpleNamespace(workdir=tmp_path, data=data)
    ids = {f"row{row}" for row in REMOVED}
    assert purge._purge_features(ctx, ids) == 2 * len(REMOVED)
    assert sorted(tmp_path.rglob("features")) == [folders[0], folders[2]]
    assert not list(tmp_path.rglob("features.new"))
    for folder in (folders[0], folders[2]):
        assert count_remaining(folder, EVERY) == NUM_ROWS - len(REMOVED)
