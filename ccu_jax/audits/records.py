"""What an audit has measured, kept in `audits/`: one file for each tier, method, seed.

A file tells of which outputs it is. What was made of others, or by a program that
measured otherwise, does not count and is made again.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from ccu_jax.distributed.hosts import barrier, is_primary, wait_until_visible
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.storage.files import write_atomically
from ccu_jax.storage.records import add_checksum, read_record

_FORMAT = 4


def place(workdir: pathlib.Path, tier: str, method: str, seed: int) -> pathlib.Path:
    """The file of a record."""
    return workdir / "audits" / f"{method}-{seed}-{tier}.json"


def outputs_of(workdir: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """The file of a model's outputs, which a record is made of."""
    return workdir / "outputs" / f"{method}-{seed}.npz"


def load(workdir: pathlib.Path, method: str, seed: int) -> Predictions:
    """The outputs of a model.

    Raises:
        UserError: they are missing or damaged.
    """
    return predictions.load_predictions(outputs_of(workdir, method, seed))


def mark(workdir: pathlib.Path, seed: int, names, **more) -> dict[str, Any]:
    """Which outputs a record is of, of those models that have some, and `more`."""
    digests = {}
    for name in dict.fromkeys(names):
        if (path := outputs_of(workdir, name, seed)).exists():
            told = path.stat()
            digests[name] = _digest(path, told.st_mtime_ns, told.st_size)
    return {"format": _FORMAT, "outputs": digests, **more}


def has(path: pathlib.Path, mark: dict[str, Any]) -> bool:
    """Whether a file holds the record that is wanted."""
    known = _read(path)
    return known is not None and known["mark"] == mark


def kept(
    path: pathlib.Path,
    mark: dict[str, Any],
    compute: Callable[[], dict[str, Any]],
    together: bool = True,
) -> dict[str, Any]:
    """The record in a file, or made now.

    Args:
        path: of `place`.
        mark: which record is wanted.
        compute: what is found, as plain JSON, with `costs_s`.
        together: whether every process calls this alike, or the first one alone.

    Returns:
        `mark`, `found`, and `seconds`, less those of the shadows that serve all.
    """
    there = (
        wait_until_visible(path, lambda: has(path, mark))
        if together
        else has(path, mark)
    )
    if there:
        return _read(path)
    began = time.perf_counter()
    found = {"mark": mark, "found": compute()}
    found["seconds"] = time.perf_counter() - began
    found["seconds"] -= found["found"]["costs_s"].get("shadow models", 0.0)
    if is_primary():
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(add_checksum(found), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())
    if together:
        barrier(path.name)
    return found


def of_model(
    path: pathlib.Path, method: str, mark: dict[str, Any]
) -> dict[str, Any] | None:
    """The record in a file if it is of this very model, whatever it is compared with.

    Args:
        path: of `place`.
        method: the model's.
        mark: of its outputs as they are now.
    """
    known = _read(path)
    if known is None or known["mark"]["format"] != _FORMAT:
        return None
    same = known["mark"]["outputs"].get(method) == mark["outputs"].get(method)
    return known if same else None


@functools.cache
def _digest(path, mtime_ns, size) -> str:
    """Of outputs that many records are made of: each is read once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _read(path):
    """A record, or None of what is missing or damaged: it is made again."""
    try:
        record = read_record(path)
    except (OSError, ValueError):
        return None
    mark = record.get("mark")
    known = isinstance(mark, dict) and {"format", "outputs"} <= mark.keys()
    return record if known and {"found", "seconds"} <= record.keys() else None
