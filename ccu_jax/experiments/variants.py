"""Methods with changed settings, which tuning and ablation are made of.

All variants start from the same original. Each is evaluated and stored in one small
file, so an interrupted tuning or ablation resumes with the next variant.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS, Problem
from ccu_jax.runs.context import RunContext, evaluation_table
from ccu_jax.runs.progress import NullStage
from ccu_jax.runs.results import (
    Result,
    load_if_finished,
    outputs_path,
    source_commit,
    write_result,
)
from ccu_jax.train.loop import Outcome


class Variant(NamedTuple):
    """A method and the settings that differ from the configuration."""

    method: str
    settings: dict[str, Any]


def check_config(config: Config, methods: list[str], expected: str) -> None:
    """Rejects a configuration whose variants of these methods cannot be run.

    Raises:
        UserError: there is no method, there are several requests, or a batch cannot be
            divided among the devices.
    """
    if not methods:
        raise UserError(f"methods: none is {expected}; pass others with --methods")
    if config.unlearn.num_requests > 1:
        raise UserError(
            f"unlearn.num_requests={config.unlearn.num_requests}: tuning and ablation "
            "need a single request; remove this setting"
        )
    check_batches(config, methods, jax.device_count())


def check_not_purged(ctx: RunContext) -> None:
    """Rejects a folder whose images were purged.

    Raises:
        UserError: they were.
    """
    if ctx.data.purged:
        raise UserError(
            f"{ctx.workdir}: the unlearned images were purged; use another --workdir"
        )


def variant_path(
    workdir: pathlib.Path, seed: int, variant: Variant, tested: bool = True
) -> pathlib.Path:
    """Returns the file of a variant's result, with test rows (`tested`) or without."""
    text = json.dumps(variant.settings, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    folder = workdir / ("tested" if tested else "variants")
    return folder / f"{variant.method}-{seed}-{digest}.json"


def run_variant(ctx: RunContext, problem: Problem, variant: Variant) -> Result:
    """Runs and evaluates a variant, or reads its stored result.

    The problem has the original and its features. Empty sets are not evaluated.

    Raises:
        UserError: the stored result is damaged or was made from other data.
    """
    tested = bool(len(problem.sets.test))
    path = variant_path(ctx.workdir, problem.seed, variant, tested)
    if (stored := load_if_finished(ctx, path)) is not None:
        return stored
    method = variant.method
    section = dataclasses.replace(getattr(problem.config, method), **variant.settings)
    config = dataclasses.replace(problem.config, **{method: section})
    problem = problem._replace(config=config)
    steps = path.with_suffix("")
    outcome = ctx.loop.run(method, METHODS[method], problem, steps, NullStage())
    result = _build_result(ctx, problem, variant, outcome)
    if is_primary():
        write_result(path, result)
        shutil.rmtree(steps, ignore_errors=True)
    barrier(path.name)
    return result


def _build_result(
    ctx: RunContext, problem: Problem, variant: Variant, outcome: Outcome
) -> Result:
    table = evaluation_table(problem, outcome.params)
    params = {**(problem.params or {}), **outcome.params}
    predicted = predictions.predict_all_splits(
        ctx.forward, params, table, ctx.data, problem.sets
    )
    collapse = None
    path = outputs_path(ctx.workdir, problem.seed, "original")
    if path.exists() and len(problem.sets.test):
        original = predictions.load_predictions(path)
        collapse = predictions.describe_collapse(predicted, original)
    seconds = outcome.seconds
    return {
        "method": variant.method,
        "settings": variant.settings,
        "seed": problem.seed,
        "metric": ctx.data.metric,
        "steps": outcome.steps,
        "seconds": seconds | {"unlearn": seconds["start"] + seconds["steps"]},
        "diverged": outcome.diverged or collapse,
        "fingerprint": ctx.data.fingerprint,
        "commit": source_commit(),
        "scores": predictions.compute_scores(predicted),
        "attack_auc": predictions.attack_auc(predicted),
    }


def without_test_rows(problem: Problem) -> Problem:
    """Returns the problem for choosing settings, which must not see test rows."""
    empty = np.zeros(0, np.int64)
    return problem._replace(sets=problem.sets._replace(test=empty))
