"""Audit records on disk: one file in `audits/` for each tier, method and seed.

A record holds a cache key with digests of the outputs that it was computed from. A
record with another key, or with a damaged file, is recomputed.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from ccu_jax.distributed.hosts import barrier, is_primary, wait_until_visible
from ccu_jax.evaluate.predictions import Predictions, load_predictions
from ccu_jax.storage.files import write_atomically
from ccu_jax.storage.records import add_checksum, read_record

_FORMAT = 5


def record_path(
    workdir: pathlib.Path, tier: str, method: str, seed: int
) -> pathlib.Path:
    """Returns the path of a record."""
    return workdir / "audits" / f"{method}-{seed}-{tier}.json"


def outputs_path(workdir: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Returns the path of a model's outputs on all splits."""
    return workdir / "outputs" / f"{method}-{seed}.npz"


def load_outputs(workdir: pathlib.Path, method: str, seed: int) -> Predictions:
    """Returns a model's outputs; raises UserError if they are missing or damaged."""
    return load_predictions(outputs_path(workdir, method, seed))


def cache_key(
    workdir: pathlib.Path, seed: int, methods: Iterable[str], **settings: Any
) -> dict[str, Any]:
    """Returns what a record depends on: digests of existing outputs, and settings."""
    paths = {name: outputs_path(workdir, name, seed) for name in methods}
    digests = {
        name: _file_digest(path, path.stat().st_mtime_ns, path.stat().st_size)
        for name, path in paths.items()
        if path.exists()
    }
    return {"format": _FORMAT, "outputs": digests, **settings}


def is_cached(path: pathlib.Path, key: dict[str, Any]) -> bool:
    """Returns whether a file holds a record with this cache key."""
    record = _read(path)
    return record is not None and record["cache_key"] == key


def load_or_compute(
    path: pathlib.Path,
    key: dict[str, Any],
    compute: Callable[[], dict[str, Any]],
    is_collective: bool = True,
) -> dict[str, Any]:
    """Returns the record in a file; computes and stores it if it is not cached.

    `compute` returns the result as plain JSON, with its `costs_s`. `is_collective` is
    whether all processes call this, or process 0 alone. The record's `seconds` exclude
    the training of shadow models, which all methods share.
    """
    if is_collective:
        is_there = wait_until_visible(path, lambda: is_cached(path, key))
    else:
        is_there = is_cached(path, key)
    if is_there:
        return read_record(path)
    start = time.perf_counter()
    result = compute()
    seconds = time.perf_counter() - start - result["costs_s"].get("shadow models", 0.0)
    record = {"cache_key": key, "result": result, "seconds": seconds}
    if is_primary():
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(add_checksum(record), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())
    if is_collective:
        barrier(path.name)
    return record


def load_for_model(
    path: pathlib.Path, method: str, key: dict[str, Any]
) -> dict[str, Any] | None:
    """Returns the record if it is of this model, whatever it was compared with.

    `key` is the current cache key of the model's outputs.
    """
    record = _read(path)
    if record is None or record["cache_key"]["format"] != _FORMAT:
        return None
    digest = record["cache_key"]["outputs"].get(method)
    return record if digest == key["outputs"].get(method) else None


@functools.cache
def _file_digest(path: pathlib.Path, mtime_ns: int, size: int) -> str:
    """Returns a file's digest; the cache notices a change by its time and size."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a record, or None if the file is missing or damaged."""
    try:
        record = read_record(path)
    except (OSError, ValueError):
        return None
    key = record.get("cache_key")
    is_complete = isinstance(key, dict) and key.keys() >= {"format", "outputs"}
    return record if is_complete and record.keys() >= {"result", "seconds"} else None
