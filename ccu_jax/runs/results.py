"""The results of finished stages: one JSON file each, listed in `results.json`."""

import contextlib
import functools
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np

import ccu_jax
from ccu_jax.distributed.hosts import wait_until_visible
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.methods import METHODS, Problem
from ccu_jax.runs.context import RunContext
from ccu_jax.storage.files import write_json
from ccu_jax.storage.records import add_checksum, read_record
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets.splits import Sets, find_near_duplicates

Result = dict[str, Any]


def result_path(workdir: pathlib.Path, seed: int, method: str) -> pathlib.Path:
    """Returns the path of a stage's result; a stage is finished if the file exists."""
    return workdir / "stages" / f"{method}-{seed}.json"


def outputs_path(workdir: pathlib.Path, seed: int, method: str) -> pathlib.Path:
    """Returns the path of the file with a stage's predictions."""
    return workdir / "outputs" / f"{method}-{seed}.npz"


def build_result(
    ctx: RunContext,
    problem: Problem,
    outcome: Outcome,
    predicted: Predictions,
    original: Predictions | None,
) -> Result:
    """Builds the fields of every result: method, cost, scores and attack AUC.

    If `original` is given, `predicted` is also checked for a collapse of the model.
    """
    collapse = None
    if original is not None:
        collapse = predictions.describe_collapse(predicted, original)
    return {
        "method": problem.method,
        "seed": problem.seed,
        "metric": ctx.data.metric,
        "steps": outcome.steps,
        "seconds": unlearning_seconds(outcome),
        "scores": predictions.compute_scores(predicted),
        "attack_auc": predictions.attack_auc(predicted),
        "diverged": outcome.diverged or collapse,
        "commit": source_commit(),
        "fingerprint": ctx.data.fingerprint,
    }


def unlearning_seconds(outcome: Outcome) -> dict[str, float]:
    """Returns the seconds by clock, and `unlearn`, the sum of `start` and `steps`."""
    seconds = outcome.seconds
    return seconds | {"unlearn": seconds["start"] + seconds["steps"]}


def describe_stage(
    ctx: RunContext, sets: Sets, predicted: Predictions, original: Predictions
) -> Result:
    """Builds the other fields of a stage's result: data, sets and environment."""
    data = ctx.data
    duplicates = find_near_duplicates(data, sets)
    rows = predicted.split == "unlearn"
    text_logits = original.logits["text"][rows], predicted.logits["text"][rows]
    return {
        "config": ctx.config.name,
        "edition": data.edition,
        "unlearn_set": {
            "rule": ctx.config.unlearn.rule,
            "modality": "image",
            "count": len(sets.unlearn),
            "images": int(data.has_image[sets.unlearn].sum()),
            "near_duplicates": {name: len(rows) for name, rows in duplicates.items()},
        },
        "corruptions": ctx.corruptions,
        "data": data.counts,
        "counts": {name: len(rows) for name, rows in sets._asdict().items()},
        "features": ctx.config.run.features,
        "text_unchanged": bool(np.array_equal(*text_logits)),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": ctx.executor.num_devices,
            "processes": jax.process_count(),
            "executor": ctx.executor.name,
        },
        "versions": {
            "ccu_jax": ccu_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }


def write_result(path: pathlib.Path, result: Result) -> None:
    """Writes a result with a checksum to its file."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, add_checksum(result))


def load_result(path: pathlib.Path) -> Result:
    """Reads a result; raises UserError if the file is damaged."""
    with contextlib.suppress(ValueError, KeyError):
        result = read_record(path)
        if {"method", "fingerprint"} <= result.keys() and type(result["seed"]) is int:
            return result
    raise UserError(f"{path}: damaged; remove it and rerun the same command")


def load_if_finished(ctx: RunContext, path: pathlib.Path) -> Result | None:
    """Reads a result, or returns None on all processes if its file is missing.

    Raises UserError if the result is damaged or was made from other data.
    """
    if not wait_until_visible(path):
        return None
    result = load_result(path)
    if result["fingerprint"] != ctx.data.fingerprint:
        raise UserError(
            f"{path}: made from other data; use another --workdir, or remove the "
            "folder to start over"
        )
    return result


def load_all_results(workdir: pathlib.Path) -> list[Result]:
    """Reads the results of all finished stages, sorted by seed and order of METHODS.

    Raises:
        UserError: a file is damaged, or contains the result of another method or seed.
            Both become parts of file names and must not lead out of the folder.
    """
    results = []
    for path in (workdir / "stages").glob("*.json"):
        result = load_result(path)
        if path != result_path(workdir, result["seed"], result["method"]):
            raise UserError(
                f"{path}: contains the result of another stage; remove it and rerun"
            )
        results.append(result)
    order = [*METHODS, *(result["method"] for result in results)]  # unknown ones last
    return sorted(results, key=lambda r: (r["seed"], order.index(r["method"])))


@functools.cache  # read once at the start, as the checkout may change during a run
def source_commit() -> str | None:
    """Returns the Git commit of the package, with "+" if it has changes, or None."""
    path = pathlib.Path(__file__)

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(path.parent), *args],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # An installed package may lie inside an unrelated repository.
        git("ls-files", "--error-unmatch", path.name)
        return git("describe", "--always", "--dirty=+") or None
    except (OSError, subprocess.SubprocessError):
        return None
