"""What trunk and text branch of an original say of every row, kept beside it.

A request to forget then starts without a pass over pictures. A store belongs to one
checkpoint: where the original's parameters differ, or the data, it does not count.
Files are raw arrays that are mapped into memory, so that a request reads the rows that
it needs, however many there are.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.data.batches import HostColumn
from ccu_jax.distributed.hosts import all_agree, barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import pool_tokens
from ccu_jax.models import VIEWS
from ccu_jax.train import checkpoint

_ABOUT = "about.json"
_FORMAT = 2  # of a store: which columns there are, and what is said of them
CHUNK_ROWS = 4096  # rows between the device and the disk


class FeatureStore(NamedTuple):
    """The stored columns of N rows, mapped into memory.

    `columns`: `features` of the trunk, `h_text`, `z_text`, the logits `original_VIEW`,
    and `fresh`, pooled features of a trunk that never learned anything; `there` `[N]`:
    rows that were not removed.
    """

    columns: dict[str, np.ndarray]
    valid: np.ndarray

    def take(self, rows) -> dict[str, np.ndarray]:
        """The columns' rows of these numbers.

        Raises:
            ValueError: one of them was removed.
        """
        self._check(rows)
        return {name: np.asarray(x).take(rows, 0) for name, x in self.columns.items()}

    def _check(self, rows):
        if not self.valid[rows].all():
            raise ValueError("the features of some of these rows were removed")

    def as_table(self, table) -> dict[str, Any]:
        """A table for `Forward.outputs` that needs no pictures and no texts.

        Raises:
            ValueError: some rows were removed.
        """
        self._check(slice(None))
        names = ("features", "h_text")
        on_host = {name: HostColumn(self.columns[name], self.valid) for name in names}
        rest = ("labels", "has_image", "has_text")
        return {**{name: table[name] for name in rest}, **on_host}


def init_untrained(model, seed: int):
    """The parameters of a model of this seed that never learned anything."""
    return model.init(jax.random.fold_in(jax.random.key(seed), 0x0FF))


def compute_features(forward, params, fresh, table, rows) -> dict[str, np.ndarray]:
    """The columns of some rows, by one pass over their pictures and texts.

    Args:
        forward: `evaluate.Forward`.
        params: of the original.
        fresh: of a model that was never trained.
        table: all rows.
        rows: which of them.
    """
    columns = forward.encode(params, table, rows)
    has = {n: np.asarray(table[n])[rows] for n in ("has_image", "has_text")}
    said = forward.outputs(params, {**columns, **has}, np.arange(len(rows)))
    columns["z_text"] = said["z_text"]
    columns |= {f"original_{view}": said[view] for view in VIEWS}
    columns["fresh"] = pool_tokens(forward.encode(fresh, table, rows)["features"])
    return columns


def write(
    folder: pathlib.Path,
    facts: dict[str, Any],
    count: int,
    columns: Callable[[np.ndarray], dict[str, np.ndarray]],
    progress: Callable[[int, int], None],
) -> None:
    """Store the columns of all rows; a kill leaves either a whole store or none.

    Every process calls this; the first one writes.

    Args:
        folder: of the store; an earlier one is replaced.
        facts: what it belongs to, see `facts_of`.
        count: N, number of rows.
        columns: gives the columns of some rows.
        progress: told how many of how many rows are done.
    """
    new = folder.with_name(folder.name + ".new")
    about: dict[str, Any] = {}
    if is_primary():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        hashed: dict[str, Any] = {}
        for start in range(0, count, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, count))
            found = columns(rows)
            for name, x in found.items() if is_primary() else ():
                if name not in files:
                    shape = (count, *x.shape[1:])
                    about[name] = {"shape": shape, "dtype": x.dtype.name}
                    path = new / f"{name}.bin"
                    files[name] = stack.enter_context(path.open("wb"))
                    hashed[name] = hashlib.sha256()
                content = np.ascontiguousarray(x).tobytes()
                # Not mapped into memory: there, a full disk would kill the process.
                files[name].write(content)
                hashed[name].update(content)
            progress(rows[-1] + 1, count)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if is_primary():
        np.ones(count, bool).tofile(new / "there.bin")
        for name, column in about.items():
            column["sha256"] = hashed[name].hexdigest()
        text = json.dumps({**facts, "columns": about}, indent=1) + "\n"
        (new / _ABOUT).write_text(text, "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    barrier("features")


def make_compute_fn(problem) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Gives the columns of some rows of a `methods.Problem` with an original."""
    fresh = problem.executor.replicate(init_untrained(problem.model, problem.seed))
    return functools.partial(
        compute_features, problem.forward, problem.params, fresh, problem.table
    )


def open_or_build(
    folder: pathlib.Path, problem, fingerprint: str, progress: Callable[[int, int], Any]
) -> FeatureStore:
    """The store of a problem's original, made anew where it is not (any more) its.

    Args:
        folder: of the store.
        problem: a `methods.Problem` with an original.
        fingerprint: of its data.
        progress: told how many of how many rows are done.

    Raises:
        UserError: it cannot be read where it has just been written.
    """
    facts = store_identity(problem.params, fingerprint)
    store = read(folder, facts)
    # Where rows were removed and the pictures are still here, a purge was cut off. All
    # processes make a new one, or none does: it takes all of their devices.
    if not all_agree(store is not None and store.valid.all()):
        count = len(problem.table["labels"])
        write(folder, facts, count, make_compute_fn(problem), progress)
        store = read(folder, facts)
    if store is None:
        raise UserError(
            f"the features in {folder} cannot be read back: is the disk the same for "
            "all processes?"
        )
    return store


def store_identity(params, fingerprint: str) -> dict[str, Any]:
    """What a store belongs to: the original's parameters, and the data."""
    digest = checkpoint.digest(params)
    return {"format": _FORMAT, "checkpoint": digest, "fingerprint": fingerprint}


def read(folder: pathlib.Path, facts: dict[str, Any]) -> FeatureStore | None:
    """The store of these facts, or None: there is none, or it is another's or damaged.

    It is read once as a whole for that, which is little beside the pass over pictures
    that it saves.

    Args:
        folder: as given to `write`.
        facts: likewise.
    """
    about = _description(folder)
    if about is None or any(about.get(key) != value for key, value in facts.items()):
        return None
    there = np.fromfile(folder / "there.bin", bool)
    # One that rows were removed from is not used, but made again.
    if there.all() and not _whole(folder, about["columns"]):
        return None
    columns = {
        name: np.memmap(
            folder / f"{name}.bin",
            jnp.dtype(column["dtype"]),
            "r",
            shape=tuple(column["shape"]),
        )
        for name, column in about["columns"].items()
    }
    return FeatureStore(columns, there)


def _whole(folder, columns) -> bool:
    """Whether all columns hold the bytes that were written."""
    for name, column in columns.items():
        with (folder / f"{name}.bin").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != column.get("sha256"):
            return False
    return True


def _description(folder) -> dict[str, Any] | None:
    """What a store says of itself, where all its files are as it says."""
    try:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        count = (folder / "there.bin").stat().st_size
        for name, column in about["columns"].items():
            if not name.isidentifier():  # it names a file, of this folder
                return None
            size = np.prod(column["shape"]) * jnp.dtype(column["dtype"]).itemsize
            if (folder / f"{name}.bin").stat().st_size != size:
                return None
            if column["shape"][0] != count or not size:
                return None
        return about if about["columns"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def remove_rows(folder: pathlib.Path, rows) -> int:
    """Overwrite rows with zeros, for good; gives how many are gone now.

    Args:
        folder: of a store; nothing happens where there is none, and a damaged one goes
            as a whole.
        rows: numbers of rows.

    Raises:
        OSError: it cannot be written.
    """
    shutil.rmtree(folder.with_name(folder.name + ".new"), ignore_errors=True)
    if not folder.exists():
        return 0
    if (about := _description(folder)) is None:
        # What cannot be read as a store may still hold these rows: nothing of it stays.
        shutil.rmtree(folder)
        return 0
    rows = np.asarray(rows, int)
    there = np.fromfile(folder / "there.bin", bool)
    there[rows] = False
    # First said to be gone: a kill in between leaves no row that could be used.
    there.tofile(folder / "there.bin")
    # What would tell whether a guess of them is right goes with them. Not written as a
    # whole: a kill in between leaves a damaged store, which goes at the next purge.
    for column in about["columns"].values():
        column.pop("sha256", None)
    (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    for name, column in about["columns"].items():
        shape, dtype = tuple(column["shape"]), jnp.dtype(column["dtype"])
        file = np.memmap(folder / f"{name}.bin", dtype, "r+", shape=shape)
        file[rows] = 0
        file.flush()
    return len(rows)


def count_remaining(folder: pathlib.Path, rows) -> int:
    """How many of these rows a store still says something of."""
    if not (folder / _ABOUT).exists():
        return 0
    about = json.loads((folder / _ABOUT).read_text("utf-8"))
    some = np.zeros(len(rows), bool)
    for name, column in about["columns"].items():
        shape, dtype = tuple(column["shape"]), jnp.dtype(column["dtype"])
        file = np.memmap(folder / f"{name}.bin", dtype, "r", shape=shape)
        found = np.asarray(file[rows]) != 0
        some |= found.any(axis=tuple(range(1, found.ndim)))
    return int(some.sum())
