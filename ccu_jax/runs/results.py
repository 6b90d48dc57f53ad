"""The results of finished stages: one JSON file each, listed in `results.json`."""

import functools
import json
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
from ccu_jax.storage.files import write_atomically
from ccu_jax.storage.records import add_checksum, read_record
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets.splits import Sets, near_duplicates

Result = dict[str, Any]


def result_path(workdir: pathlib.Path, seed: int, method: str) -> pathlib.Path:
    """Returns the file of a stage's result; a stage is finished if the file exists."""
    return workdir / "stages" / f"{method}-{seed}.json"


def outputs_path(workdir: pathlib.Path, seed: int, method: str) -> pathlib.Path:
    """Returns the file of a stage's predictions."""
    return workdir / "outputs" / f"{method}-{seed}.npz"


def build_result(
    ctx: RunContext,
    problem: Problem,
    outcome: Outcome,
    predicted: Predictions,
    seconds: dict[str, float],
    requests: list[dict[str, Any]],
) -> Result:
    """Returns the result of a stage.

    Args:
        ctx: the context of the run.
        problem: what the method was given, with the method's name.
        outcome: of the training loop.
        predicted: predictions of the new model.
        seconds: wall time of each part of the stage.
        requests: the records of `requests.run_requests`, if there are several.

    Raises:
        UserError: the original's predictions are missing or damaged.
    """
    config, data = problem.config, ctx.data
    original = predictions.load_predictions(
        outputs_path(ctx.workdir, problem.seed, "original")
    )
    return {
        "config": config.name,
        "edition": data.edition,
        "method": problem.method,
        "seed": problem.seed,
        "metric": data.metric,
        "unlearn_set": _describe_unlearn_set(ctx, problem.sets),
        "corruptions": ctx.corruptions,
        "data": data.counts,
        "counts": {name: len(rows) for name, rows in problem.sets._asdict().items()},
        "seconds": seconds,
        "features": config.run.features,
        "steps": outcome.steps,
        "scores": predictions.compute_scores(predicted),
        "attack_auc": predictions.attack_auc(predicted),
        "text_unchanged": _text_logits_unchanged(original, predicted),
        "requests": requests,
        "diverged": outcome.diverged
        or predictions.describe_collapse(predicted, original),
        **_describe_environment(problem),
        "fingerprint": data.fingerprint,
    }


def _describe_unlearn_set(ctx: RunContext, sets: Sets) -> Result:
    duplicates = near_duplicates(ctx.data, sets)
    return {
        "rule": ctx.config.unlearn.rule,
        "modality": "image",
        "count": len(sets.unlearn),
        "images": int(ctx.data.has_image[sets.unlearn].sum()),
        "near_duplicates": {name: len(rows) for name, rows in duplicates.items()},
    }


def _describe_environment(problem: Problem) -> Result:
    return {
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": problem.executor.num_devices,
            "processes": jax.process_count(),
            "executor": problem.executor.name,
        },
        "versions": {
            "ccu_jax": ccu_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "commit": source_commit(),
    }


def _text_logits_unchanged(original: Predictions, predicted: Predictions) -> bool:
    """Returns whether the unlearn set's text logits equal the original's bitwise."""
    rows = predicted.split == "unlearn"
    before, after = original.logits["text"][rows], predicted.logits["text"][rows]
    return bool(np.array_equal(before, after))


def write_result(path: pathlib.Path, result: Result) -> None:
    """Writes the result of a stage to its file, with a checksum."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(add_checksum(result), indent=1) + "\n"
    write_atomically(path, text.encode())


def load_result(path: pathlib.Path) -> Result:
    """Reads the result of a stage.

    Raises:
        UserError: the file is damaged.
    """
    try:
        result = read_record(path)
        is_result = {"method", "fingerprint"} <= result.keys()
        if is_result and type(result["seed"]) is int:
            return result
    except (ValueError, KeyError):
        pass
    raise UserError(f"{path}: damaged; remove it and rerun the same command")


def load_if_finished(ctx: RunContext, path: pathlib.Path) -> Result | None:
    """Returns a result if its file exists, the same in all processes.

    Raises:
        UserError: the result is damaged or was made from other data.
    """
    if not wait_until_visible(path):
        return None
    result = load_result(path)
    if result["fingerprint"] != ctx.data.fingerprint:
        raise UserError(
            f"{path}: made from other data than the current ones; use another "
            "--workdir, or remove the folder to start over"
        )
    return result


def load_all_results(workdir: pathlib.Path) -> list[Result]:
    """Reads the results of all finished stages, by seed and in the order of METHODS.

    Raises:
        UserError: a file is damaged, or holds the result of another method or seed.
            Both become parts of file names and must not lead out of the folder.
    """
    results = []
    for path in (workdir / "stages").glob("*.json"):
        result = load_result(path)
        if path != result_path(workdir, result["seed"], result["method"]):
            raise UserError(f"{path}: holds the result of another stage; remove it")
        results.append(result)
    order = {name: number for number, name in enumerate(METHODS)}
    last = len(order)
    return sorted(results, key=lambda r: (r["seed"], order.get(r["method"], last)))


@functools.cache  # read once at the start, as the checkout may change during a run
def source_commit() -> str | None:
    """Returns the commit of the running source, with a + if it has local changes.

    None if the source is not under version control.
    """
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
