"""Runs methods with changed settings, for tuning and ablation.

All variants start from the same original. Each is evaluated and stored in one small
file, so an interrupted tuning or ablation resumes with the next variant.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import load_predictions
from ccu_jax.methods import METHODS, REFERENCE, Problem
from ccu_jax.runs import results
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.runs.results import Result, outputs_path
from ccu_jax.runs.session import open_run
from ccu_jax.runs.stages import build_problem_with_original, run_seed

Settings = dict[str, Any]  # the fields of a section that differ from the configuration
ATTACKED_VIEWS = ("image", "fused", "pair")


@contextlib.contextmanager
def open_variants(
    config: Config,
    workdir: pathlib.Path,
    methods: list[str],
    method_kind: str,
    titles: list[str],
) -> Iterator[tuple[RunContext, list[Problem]]]:
    """Opens a run and trains the original and the retrained reference of each seed.

    `titles` are those of the caller's stages; `method_kind` describes `methods` in the
    error message for an empty list. Yields the context, and the problem of each seed
    with its original and features.

    Raises UserError if the configuration or the working folder is invalid.
    """
    if not methods:
        raise UserError(
            f"methods={','.join(config.methods)}: no {method_kind}; add one, for "
            "example --methods ccu_plus"
        )
    if config.unlearn.num_requests > 1:
        raise UserError(
            f"unlearn.num_requests={config.unlearn.num_requests}: tuning and ablation "
            "need a single request; remove this setting"
        )
    check_batches(config, methods, jax.device_count())
    references = ["original", REFERENCE]
    reduced = dataclasses.replace(config, methods=tuple(references))
    features = {seed: f"seed {seed}: features" for seed in config.seeds}
    titles = [*features.values(), *titles]
    with open_run(reduced, workdir, titles) as (ctx, sets_by_seed):
        if ctx.data.purged:
            raise UserError(
                f"{workdir}: the unlearned images were purged; use another --workdir"
            )
        for seed, sets in sets_by_seed.items():
            run_seed(ctx, seed, sets, references)
        problems = []
        for seed, sets in sets_by_seed.items():
            with ctx.reporter.stage(features[seed]) as stage:
                problems.append(build_problem_with_original(ctx, seed, sets, stage))
        yield ctx, problems


def variant_path(
    workdir: pathlib.Path, problem: Problem, method: str, settings: Settings
) -> pathlib.Path:
    """Returns the path of a variant's result, in `tested/` if there are test rows."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    folder = workdir / ("tested" if len(problem.sets.test) else "variants")
    return folder / f"{method}-{problem.seed}-{digest}.json"


def run_variant(
    ctx: RunContext, problem: Problem, method: str, settings: Settings
) -> Result:
    """Runs and evaluates a method with changed settings, or loads its stored result.

    `problem` includes the original and its features. Empty splits are not evaluated.

    Raises UserError if the stored result is damaged or was made from other data.
    """
    path = variant_path(ctx.workdir, problem, method, settings)
    if (stored := results.load_if_finished(ctx, path)) is not None:
        return stored
    section = dataclasses.replace(getattr(problem.config, method), **settings)
    config = dataclasses.replace(problem.config, **{method: section})
    problem = problem._replace(config=config, method=method)
    checkpoints = path.with_suffix("")
    outcome = ctx.loop.run(method, METHODS[method], problem, checkpoints, NullStage())
    params = {**problem.original, **outcome.params}
    predictions = ctx.predict(problem, params, outcome.params)
    original, original_path = None, outputs_path(ctx.workdir, problem.seed, "original")
    if len(problem.sets.test) and original_path.exists():
        original = load_predictions(original_path)
    result = results.build_result(ctx, problem, outcome, predictions, original)
    result["settings"] = settings
    if is_primary():
        results.write_result(path, result)
        shutil.rmtree(checkpoints, ignore_errors=True)
    barrier(path.name)
    return result


def without_test_rows(problem: Problem) -> Problem:
    """Returns the problem without its test rows, for choosing settings."""
    empty = np.zeros(0, np.int64)
    return problem._replace(sets=problem.sets._replace(test=empty))
