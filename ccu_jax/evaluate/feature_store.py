"""Features of the original model for all rows, stored on disk.

With them, unlearning starts without a pass over the images. A store belongs to one
checkpoint and one version of the data; for others it is stale. Columns are raw,
memory-mapped arrays, so only the rows in use are read.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import HostColumn, Table
from ccu_jax.distributed.hosts import all_agree, barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward, pool_tokens
from ccu_jax.models import VIEWS, Params
from ccu_jax.storage.columns import ColumnWriter
from ccu_jax.train import checkpoint

_DESCRIPTION = "about.json"
_VALID = "there.bin"
_FORMAT = 2  # changes with the set of columns and the description
CHUNK_ROWS = 4096  # rows that are computed at a time, to bound memory

ComputeFn = Callable[[np.ndarray], dict[str, np.ndarray]]
ProgressFn = Callable[[int, int], Any]


class FeatureStore(NamedTuple):
    """The memory-mapped features of N rows.

    Columns are the trunk's `features`, `h_text`, `z_text`, the logits `original_VIEW`,
    and `fresh`, the pooled features of an untrained trunk.
    """

    columns: Mapping[str, np.ndarray]
    valid: np.ndarray  # bool `[N]`, False for erased rows

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads rows of all columns. Raises ValueError if any of them was erased."""
        self._check_valid(rows)
        return {name: np.asarray(x).take(rows, 0) for name, x in self.columns.items()}

    def as_table(self, table: Table) -> dict[str, Any]:
        """Returns a table for `Forward.compute_outputs` with features but no images.

        `table` has labels and masks of all rows. Raises ValueError if one was erased.
        """
        self._check_valid(slice(None))
        features, h_text = (
            HostColumn(self.columns[name], self.valid)
            for name in ("features", "h_text")
        )
        unchanged = {name: table[name] for name in ("labels", "has_image", "has_text")}
        return {**unchanged, "features": features, "h_text": h_text}

    def _check_valid(self, rows):
        if not self.valid[rows].all():
            raise ValueError("rows: features of some were erased by a purge")


def make_compute_fn(
    forward: Forward, params: Params, table: Table, seed: int
) -> ComputeFn:
    """Returns a function that computes the columns of a `FeatureStore` for given rows.

    It encodes rows of `table` with the original (`params`) and an untrained trunk.
    """
    # Independent of the original, whose parameters start from the same seed.
    key = jax.random.fold_in(jax.random.key(seed), 0x0FF)
    untrained = forward.executor.replicate(forward.model.init(key))

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        columns = forward.encode(params, table, rows)
        has = {n: np.asarray(table[n])[rows] for n in ("has_image", "has_text")}
        outputs = forward.compute_outputs(params, columns | has, np.arange(len(rows)))
        columns["z_text"] = outputs["z_text"]
        columns |= {f"original_{view}": outputs[view] for view in VIEWS}
        features = forward.encode(untrained, table, rows)["features"]
        columns["fresh"] = pool_tokens(features)
        return columns

    return compute


def open_or_build(
    folder: pathlib.Path,
    forward: Forward,
    params: Params,
    table: Table,
    seed: int,
    fingerprint: str,
    progress: ProgressFn,
) -> FeatureStore:
    """Opens the original's store, or builds it if it is missing, stale or damaged.

    `fingerprint` identifies the data; `progress` is called with (rows done, rows). The
    other arguments are those of `make_compute_fn`.

    Raises UserError if the store cannot be read back after it was written.
    """
    identity = store_identity(params, fingerprint)
    store = read(folder, identity)
    # An interrupted purge may have erased rows whose images are still present.
    # Building uses the devices of all processes, so either all of them build or none.
    if not all_agree(store is not None and bool(store.valid.all())):
        compute = make_compute_fn(forward, params, table, seed)
        write(folder, identity, len(table["labels"]), compute, progress)
        store = read(folder, identity)
    if store is None:
        raise UserError(
            f"{folder}: features cannot be read back; make sure that all processes "
            "share this folder, then rerun the same command"
        )
    return store


def store_identity(params: Params, fingerprint: str) -> dict[str, Any]:
    """Returns the store's key: digests of the original's parameters and of the data."""
    digest = checkpoint.hash_tree(params)
    return {"format": _FORMAT, "checkpoint": digest, "fingerprint": fingerprint}


def write(
    folder: pathlib.Path,
    identity: dict[str, Any],
    num_rows: int,
    compute: ComputeFn,
    progress: ProgressFn,
) -> None:
    """Computes and writes a store, atomically replacing an earlier one.

    All processes compute; the primary process writes. `identity` is the result of
    `store_identity`; `progress` is called with (rows done, rows).
    """
    new = folder.with_name(folder.name + ".new")
    if is_primary():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    files: dict[str, ColumnWriter] = {}
    with contextlib.ExitStack() as stack:
        for rows in iterate_chunks(np.arange(num_rows)):
            columns = compute(rows)
            for name, x in columns.items() if is_primary() else ():
                if name not in files:
                    column = ColumnWriter(new / f"{name}.bin", x.dtype, x.shape[1:])
                    files[name] = stack.enter_context(column)
                files[name].append(x)
            progress(rows[-1] + 1, num_rows)
        for column in files.values():
            column.sync()
    if is_primary():
        np.ones(num_rows, bool).tofile(new / _VALID)
        descriptions = {
            name: {
                "shape": (column.num_rows, *column.row_shape),
                "dtype": column.dtype.name,
                "sha256": column.sha256.hexdigest(),
            }
            for name, column in files.items()
        }
        _write_description(new, {**identity, "columns": descriptions})
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    barrier("features")


def read(folder: pathlib.Path, identity: dict[str, Any]) -> FeatureStore | None:
    """Opens a store, or returns None if it is missing, damaged or stale.

    Verifies the checksums of all columns, which is cheap compared to encoding images.
    """
    description = _read_description(folder)
    if description is None or not identity.items() <= description.items():
        return None
    valid = np.fromfile(folder / _VALID, bool)
    # `erase_rows` removes the checksums.
    if valid.all() and not all(
        _matches_checksum(folder / f"{name}.bin", column)
        for name, column in description["columns"].items()
    ):
        return None
    return FeatureStore(_map_columns(folder, description, "r"), valid)


def erase_rows(folder: pathlib.Path, rows: np.ndarray) -> int:
    """Overwrites rows of a store with zeros; returns their number (0 without a store).

    A damaged store may still contain these rows, so it is deleted.

    Raises OSError if the store cannot be written.
    """
    shutil.rmtree(folder.with_name(folder.name + ".new"), ignore_errors=True)
    if not folder.exists():
        return 0
    if (description := _read_description(folder)) is None:
        shutil.rmtree(folder)
        return 0
    rows = np.asarray(rows, int)
    valid = np.fromfile(folder / _VALID, bool)
    valid[rows] = False
    # Written first, so that after a kill no row that lost some of its columns is used.
    valid.tofile(folder / _VALID)
    # Checksums could confirm a guess of the erased rows. This write is not atomic: a
    # kill leaves a damaged store, which the next purge deletes.
    for column in description["columns"].values():
        column.pop("sha256", None)
    _write_description(folder, description)
    for column in _map_columns(folder, description, "r+").values():
        column[rows] = 0
        column.flush()
    return len(rows)


def count_nonzero_rows(folder: pathlib.Path, rows: np.ndarray) -> int:
    """Counts the given rows that still have a nonzero value in some column."""
    if not (folder / _DESCRIPTION).exists():
        return 0
    description = json.loads((folder / _DESCRIPTION).read_text("utf-8"))
    remains = np.zeros(len(rows), bool)
    for column in _map_columns(folder, description, "r").values():
        is_nonzero = np.asarray(column[rows]) != 0
        remains |= is_nonzero.any(axis=tuple(range(1, is_nonzero.ndim)))
    return int(remains.sum())


def iterate_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields row numbers, at most `CHUNK_ROWS` at a time."""
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _map_columns(folder, description, mode) -> dict[str, np.memmap]:
    return {
        name: np.memmap(
            folder / f"{name}.bin",
            jnp.dtype(column["dtype"]),
            mode,
            shape=tuple(column["shape"]),
        )
        for name, column in description["columns"].items()
    }


def _matches_checksum(path, column) -> bool:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest == column.get("sha256")


def _write_description(folder, description):
    text = json.dumps(description, indent=1) + "\n"
    (folder / _DESCRIPTION).write_text(text, "utf-8")


def _read_description(folder) -> dict[str, Any] | None:
    """Returns the description of a store, or None if a file does not match it."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text("utf-8"))
        num_rows = (folder / _VALID).stat().st_size
        for name, column in description["columns"].items():
            if not name.isidentifier():  # a path would lead out of the folder
                return None
            size = np.prod(column["shape"]) * jnp.dtype(column["dtype"]).itemsize
            if not size or size != (folder / f"{name}.bin").stat().st_size:
                return None
            if column["shape"][0] != num_rows:
                return None
        return description if description["columns"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
