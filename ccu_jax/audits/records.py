"""Audit records: one file per tier, method and seed, merged into audit.json.

The cache key of a record contains digests of the outputs that it was computed from. A
record is recomputed if its key differs or its file is damaged.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ccu_jax.audits.offline import audit_outputs
from ccu_jax.audits.verdict import verdict_over_seeds
from ccu_jax.distributed.hosts import Progress, is_primary, run_on_primary
from ccu_jax.evaluate.predictions import Predictions, load_predictions
from ccu_jax.methods import CONTROL, REFERENCE
from ccu_jax.runs.results import load_all_results, outputs_path
from ccu_jax.storage.files import write_atomically
from ccu_jax.storage.records import add_checksum, read_record

TIERS = ("smoke", "standard", "rigorous")
# All models are compared with these.
COMPARISON_MODELS = ("original", REFERENCE, CONTROL)
_FORMAT = 5
Record = dict[str, Any]


class RecordFile(NamedTuple):
    """The path of an audit record and the cache key of an up-to-date record."""

    path: pathlib.Path
    cache_key: dict[str, Any]

    def is_cached(self) -> bool:
        """Returns whether the file contains a record with this cache key."""
        record = self.load()
        return record is not None and record["cache_key"] == self.cache_key

    def load(self) -> Record | None:
        """Returns the record, even if stale; None if it is missing or damaged."""
        try:
            record = read_record(self.path)
        except (OSError, ValueError):
            return None
        key = record.get("cache_key")
        has_key = isinstance(key, dict) and key.keys() >= {"format", "outputs"}
        return record if has_key and record.keys() >= {"result", "seconds"} else None

    def load_for_model(self, method: str) -> Record | None:
        """Returns the record, or None if the outputs of `method` changed.

        The outputs of the comparison models may have changed.
        """
        record = self.load()
        if record is None or record["cache_key"]["format"] != _FORMAT:
            return None
        digest = record["cache_key"]["outputs"].get(method)
        return record if digest == self.cache_key["outputs"].get(method) else None

    def compute_and_store(self, compute: Callable[..., Record], *args: Any) -> None:
        """Computes the record on all processes and stores it on process 0.

        `compute(*args)` returns plain JSON with `costs_s`. The `seconds` of the record
        exclude the training of shadow models, which all methods share.
        """
        start_s = time.perf_counter()
        result = compute(*args)
        seconds = time.perf_counter() - start_s
        seconds -= result["costs_s"].get("shadow models", 0.0)
        record = {"cache_key": self.cache_key, "result": result, "seconds": seconds}
        if is_primary():
            self.path.parent.mkdir(exist_ok=True)
            text = json.dumps(add_checksum(record), indent=1, allow_nan=False) + "\n"
            write_atomically(self.path, text.encode())


def locate_record(
    workdir: pathlib.Path, tier: str, method: str, seed: int, **settings: Any
) -> RecordFile:
    """Returns the path of a record, and its cache key from outputs and `settings`."""
    digests = {}
    for name in (method, *COMPARISON_MODELS):
        path = outputs_path(workdir, seed, name)
        if path.exists():
            stat = path.stat()
            digests[name] = _file_digest(path, stat.st_mtime_ns, stat.st_size)
    path = workdir / "audits" / f"{method}-{seed}-{tier}.json"
    return RecordFile(path, {"format": _FORMAT, "outputs": digests, **settings})


@functools.cache
def _file_digest(path: pathlib.Path, mtime_ns: int, size: int) -> str:
    """Returns the SHA-256 prefix of a file, cached by path, mtime and size."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_outputs(
    workdir: pathlib.Path, method: str, seed: int
) -> dict[str, Predictions]:
    """Loads the outputs of a method, as "model", and of existing comparison models.

    Raises:
        UserError: a file is damaged, or that of the method or the original is missing.
    """
    outputs = {"model": load_predictions(outputs_path(workdir, seed, method))}
    for name in COMPARISON_MODELS:
        path = outputs_path(workdir, seed, name)
        if name == "original" or path.exists():
            outputs[name] = load_predictions(path)
    return outputs


def write_audit(workdir: pathlib.Path, report_progress: Progress) -> list[Record]:
    """Computes the missing records of the smoke tier and writes audit.json.

    Every process must call this; only process 0 works, because the others may not see
    all files yet.

    Returns:
        The records of `collect_records` on process 0, [] on others.
    """

    def write(progress: Progress) -> list[Record]:
        results = load_all_results(workdir)
        for index, result in enumerate(results):
            progress("audit", index, len(results))
            method, seed = result["method"], result["seed"]
            file = locate_record(workdir, "smoke", method, seed)
            if not file.is_cached():
                file.compute_and_store(_audit_outputs, workdir, method, seed)
        progress("audit", len(results), len(results))
        if methods := collect_records(workdir):
            text = json.dumps(methods, indent=1, allow_nan=False) + "\n"
            write_atomically(workdir / "audit.json", text.encode())
        return methods

    return run_on_primary(write, report_progress) or []


def _audit_outputs(workdir: pathlib.Path, method: str, seed: int) -> Record:
    return audit_outputs(load_outputs(workdir, method, seed))


def collect_records(workdir: pathlib.Path) -> list[Record]:
    """Returns a dict per finished method with its verdict and the records by seed.

    Omits methods without a record of the smoke tier.
    """
    by_method: dict[str, list[Record]] = {}
    for result in load_all_results(workdir):
        if record := _merge_tiers(workdir, result):
            by_method.setdefault(result["method"], []).append(record)
    return [
        {
            "method": method,
            "edition": seeds[0].pop("edition", None),
            "verdict": verdict_over_seeds(seeds, method == REFERENCE),
            "seeds": seeds,
        }
        for method, seeds in by_method.items()
    ]


def _merge_tiers(workdir: pathlib.Path, result: Record) -> Record | None:
    """Merges the records of all tiers; returns None if the smoke tier has no record."""
    method, seed = result["method"], result["seed"]
    merged = {name: result.get(name) for name in ("edition", "diverged", "commit")}
    seconds, costs = {}, {}
    for tier in TIERS:
        record = locate_record(workdir, tier, method, seed).load_for_model(method)
        if record is not None:
            merged |= record["result"]
            seconds[tier] = record["seconds"]
            costs |= record["result"]["costs_s"]
    if "smoke" not in seconds:
        return None
    return {"seed": seed, **merged, "seconds": seconds, "costs_s": costs}
