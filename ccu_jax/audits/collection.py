"""Compiles the records of an audit into audit.json: one entry per method."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from ccu_jax.audits import offline, records
from ccu_jax.audits.verdict import verdict_over_seeds
from ccu_jax.distributed.hosts import Progress, run_on_primary
from ccu_jax.methods import CONTROL, REFERENCE
from ccu_jax.runs.results import load_all_results
from ccu_jax.storage.files import write_atomically

ReportProgress = Callable[[str, int, int], None]


def write_audit(
    workdir: pathlib.Path, report_progress: ReportProgress
) -> list[dict[str, Any]]:
    """Completes the records of the smoke tier and writes audit.json.

    Every process calls this. Process 0 does the work alone, because others may not see
    all files yet.

    Returns:
        The records of `collect_records` on process 0, [] on others.
    """

    def write(progress: Progress) -> list[dict[str, Any]]:
        if methods := collect_records(workdir, progress):
            text = json.dumps(methods, indent=1, allow_nan=False) + "\n"
            write_atomically(workdir / "audit.json", text.encode())
        return methods

    return run_on_primary(write, report_progress) or []


def collect_records(
    workdir: pathlib.Path, report_progress: ReportProgress | None = None
) -> list[dict[str, Any]]:
    """Returns the records of all finished methods, with their verdicts.

    With `report_progress` missing records of the smoke tier are computed; without it
    methods that have none are left out.
    """
    results = load_all_results(workdir)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for index, result in enumerate(results):
        if report_progress:
            report_progress("audit", index, len(results))
        record = _merge_records(workdir, result, should_compute=bool(report_progress))
        if record:
            by_method.setdefault(result["method"], []).append(record)
    if report_progress:
        report_progress("audit", len(results), len(results))
    return [
        {
            "method": method,
            "edition": seeds[0].pop("edition", None),
            "verdict": verdict_over_seeds(seeds, method == REFERENCE),
            "seeds": seeds,
        }
        for method, seeds in by_method.items()
    ]


def _merge_records(
    workdir: pathlib.Path, result: dict[str, Any], should_compute: bool
) -> dict[str, Any] | None:
    """Returns the records of all tiers of a method and seed as one, or None."""
    method, seed = result["method"], result["seed"]
    compared = compared_outputs(workdir, seed)
    key = records.cache_key(workdir, seed, (method, *compared))

    def compute() -> dict[str, Any]:
        outputs = {
            name: records.load_outputs(workdir, name, seed)
            for name in (method, *compared)
        }
        return offline.audit_outputs(
            offline.AuditInputs(
                outputs[method],
                outputs["original"],
                outputs.get(REFERENCE),
                outputs.get(CONTROL),
            )
        )

    path = records.record_path(workdir, "smoke", method, seed)
    if should_compute:
        smoke = records.load_or_compute(path, key, compute, is_collective=False)
    else:
        smoke = records.load_for_model(path, method, key)
        if smoke is None:
            return None
    origin = {name: result.get(name) for name in ("edition", "diverged", "commit")}
    merged = {"seed": seed, **origin, **smoke["result"]}
    seconds, costs = {"smoke": smoke["seconds"]}, merged["costs_s"]
    for tier in ("standard", "rigorous"):
        path = records.record_path(workdir, tier, method, seed)
        if record := records.load_for_model(path, method, key):
            merged |= record["result"]
            seconds[tier] = record["seconds"]
            costs = costs | record["result"]["costs_s"]
    return merged | {"seconds": seconds, "costs_s": costs}


def compared_outputs(workdir: pathlib.Path, seed: int) -> tuple[str, ...]:
    """Returns the models to compare with that have outputs; the original always has."""
    references = (
        name
        for name in (REFERENCE, CONTROL)
        if records.outputs_path(workdir, name, seed).exists()
    )
    return ("original", *references)
