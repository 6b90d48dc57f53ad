"""The rows of `results.json`, one for each finished stage of a run."""

import functools
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np

import ccu_jax
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS
from ccu_jax.runs.context import RunContext
from ccu_jax.storage.files import write_atomically
from ccu_jax.storage.records import add_checksum, read_record
from ccu_jax.unlearn_sets import splits as unlearn_set


def result_path(workdir: pathlib.Path, seed: int, method: str) -> pathlib.Path:
    """The file of a stage's row; where it lies, the stage is finished."""
    return workdir / "stages" / f"{method}-{seed}.json"


def build_result(
    ctx: RunContext, problem, outcome, results, seconds, requests
) -> dict[str, Any]:
    """The row of a stage.

    Args:
        ctx: the context of the run. the original's outputs lie in its folder.
        problem: what the method was given, with its name.
        outcome: of the loop.
        results: the new model's outputs.
        seconds: by clock.
        requests: what `requests.run` told of each; none where there was one.

    Raises:
        UserError: the original's outputs cannot be read.
    """
    sets, config, data = problem.sets, problem.config, ctx.data
    before = predictions.load_predictions(
        ctx.workdir / "outputs" / f"original-{problem.seed}.npz"
    )
    return {
        "config": config.name,
        "edition": data.edition,
        "method": problem.method,
        "seed": problem.seed,
        "metric": data.metric,
        "unlearn_set": {
            "rule": config.unlearn.rule,
            "modality": "image",
            "count": len(sets.unlearn),
            "pictures": int(data.has_image[sets.unlearn].sum()),
            "near_duplicates": {
                name: len(rows)
                for name, rows in unlearn_set.near_duplicates(data, sets).items()
            },
        },
        "corruptions": ctx.corruptions,
        "data": data.counts,
        "counts": {name: len(rows) for name, rows in sets._asdict().items()},
        "seconds": seconds,
        "features": config.run.features,
        "steps": outcome.steps,
        "scores": predictions.compute_scores(results),
        "attack_auc": predictions.attack_auc(results),
        "text_unchanged": _text_unchanged(before, results),
        "requests": requests,
        "diverged": outcome.diverged or predictions.describe_collapse(results, before),
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
        "fingerprint": data.fingerprint,
    }


def _text_unchanged(before, results) -> bool:
    """Whether the unlearn set's text scores are the original's, to the bit."""
    of = results.split == "unlearn"
    return bool(np.array_equal(before.logits["text"][of], results.logits["text"][of]))


def write_result(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Writes the row of a stage to its file, with a digest."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(add_checksum(row), indent=1) + "\n"
    write_atomically(path, text.encode())


def load_result(path: pathlib.Path) -> dict[str, Any]:
    """The row in the file of a stage.

    Raises:
        UserError: the file is damaged.
    """
    try:
        row = read_record(path)
        if {"method", "fingerprint"} <= row.keys() and type(row["seed"]) is int:
            return row
    except (ValueError, KeyError):
        pass
    raise UserError(f"{path} is damaged: remove it to do that stage again")


def load_all_results(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of all finished stages, in the order of the methods' table.

    Raises:
        UserError: the file of one is damaged, or another's: method and seed are names
            of files, too, and must not lead out of the folder.
    """
    found = []
    for path in (workdir / "stages").glob("*.json"):
        row = load_result(path)
        if path != result_path(workdir, row["seed"], row["method"]):
            raise UserError(f"{path} is not its own row: remove it")
        found.append(row)
    order = {name: number for number, name in enumerate(METHODS)}
    return sorted(
        found, key=lambda row: (row["seed"], order.get(row["method"], len(order)))
    )


@functools.cache  # asked once, at the start: the checkout may change during a run
def source_commit() -> str | None:
    """The commit of the source that runs, with a + where it was changed since."""
    here = pathlib.Path(__file__)

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # Installed into an environment, it may lie in somebody else's repository.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty=+") or None
    except (OSError, subprocess.SubprocessError):
        return None
