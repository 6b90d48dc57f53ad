"""The stages of a run: train the original, draw what it forgets, run every method."""

import functools
import time
from typing import Any

import jax

from ccu_jax.distributed.hosts import barrier, is_primary, wait_until_visible
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate import memorization, predictions
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.models import TAIL
from ccu_jax.runs import requests
from ccu_jax.runs import results as rows
from ccu_jax.runs import workdir as workdirs
from ccu_jax.runs.context import RunContext, build_problem
from ccu_jax.train import checkpoint
from ccu_jax.unlearn_sets import rules as unlearn_rules
from ccu_jax.unlearn_sets import splits as unlearn_set
from ccu_jax.unlearn_sets.splits import Sets


def stage_title(seed: int, method: str) -> str:
    """What a stage is called on the screen."""
    return f"seed {seed}: {method}"


def load_result_if_finished(
    ctx: RunContext, seed: int, method: str
) -> dict[str, Any] | None:
    """The row of a stage that is finished and belongs to these data.

    Raises:
        UserError: it belongs to others.
    """
    path = rows.result_path(ctx.workdir, seed, method)
    if not wait_until_visible(path):
        return None
    row = rows.load_result(path)
    if row["fingerprint"] != ctx.data.fingerprint:
        raise UserError(
            f"the data have changed since {ctx.workdir} was made: give another "
            "--workdir, or remove the folder to start anew"
        )
    return row


def draw_sets(
    ctx: RunContext, seed: int, store: features.FeatureStore | None = None
) -> Sets:
    """A seed's sets.

    What was memorised only a trained original says: before, `unlearn` is empty.

    Args:
        ctx: of the run.
        seed: of the order.
        store: of an original that was trained on what was drawn before.

    Raises:
        UserError: the rule cannot be followed, or not in so many requests.
    """
    kind = unlearn_rules.parse_rule(ctx.config.unlearn.rule).kind
    if kind in unlearn_rules.DATA_DEPENDENT and load_result_if_finished(
        ctx, seed, "original"
    ):
        # The pictures that were looked at may be gone.
        return workdirs.load_evaluated_sets(ctx, seed)
    sets = _sets(ctx, seed)
    if store is not None:
        known = memorization.estimate_memorization(
            ctx.data, store, sets.retain, sets.unseen, seed
        )
        sets = _sets(ctx, seed, known)
        told = memorization.describe(ctx.data, known, sets)
        ctx.reporter.log(f"seed {seed}: {told}")
    if len(sets.unlearn):
        requests.split_requests(ctx, seed, sets)
    return sets


def _sets(ctx: RunContext, seed, known=None):
    config = ctx.config.unlearn
    return unlearn_set.draw_sets(
        ctx.data, config.rule, seed, config.holdout_fraction, config.duplicates, known
    )


def problem_with_original(ctx: RunContext, seed: int, sets: Sets, stage) -> Problem:
    """What the methods of a seed are given, with its finished original and features."""
    problem = build_problem(ctx, seed, sets)
    problem = problem._replace(params=load_params(ctx, seed, "original"))
    problem = problem._replace(store=_open_feature_store(ctx, problem, stage))
    return problem if len(sets.unlearn) else problem._replace(sets=draw_sets(ctx, seed))


def run_seed(ctx: RunContext, seed: int, sets: Sets, methods: list[str]) -> None:
    """All methods of one seed, the original first."""
    problem = build_problem(ctx, seed, sets)
    for method in methods:
        if load_result_if_finished(ctx, seed, method) is None:
            if method not in REFERENCES and problem.params is None:
                problem = problem._replace(params=load_params(ctx, seed, "original"))
            with ctx.reporter.stage(stage_title(seed, method)) as stage:
                began = time.perf_counter()
                if problem.params is not None and problem.store is None:
                    problem = problem._replace(
                        store=_open_feature_store(ctx, problem, stage)
                    )
                sets = _run_stage(ctx, problem, method, stage, began)
                problem = problem._replace(sets=sets)


def _checkpoint_dir(ctx: RunContext, seed, method):
    return ctx.workdir / "checkpoints" / f"{method}-{seed}"


def load_params(ctx: RunContext, seed: int, method: str):
    """The parameters that a finished method has left, on the devices.

    Raises:
        UserError: its checkpoint is missing or damaged.
    """
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    folder = _checkpoint_dir(ctx, seed, method) / "params"
    saved = checkpoint.restore(folder, shapes, ctx.reporter.warn)
    if saved is None:
        whose = "the original's" if method == "original" else f"{method}'s"
        raise UserError(
            f"{whose} checkpoint in {folder} is missing or damaged: remove "
            f"{rows.result_path(ctx.workdir, seed, method)} to train it again"
        )
    return ctx.executor.replicate(saved.tree)


def _open_feature_store(ctx: RunContext, problem, stage) -> features.FeatureStore:
    folder = _checkpoint_dir(ctx, problem.seed, "original") / "features"
    tell = functools.partial(stage.report_progress, "storing features")
    return features.open_or_build(
        folder,
        problem.forward,
        problem.params,
        problem.table,
        problem.seed,
        ctx.data.fingerprint,
        tell,
    )


def _run_stage(
    ctx: RunContext, problem: Problem, method: str, stage, began: float
) -> Sets:
    """Run one method, evaluate it, store all of it; the record comes last.

    Gives the sets: of some the original, now trained, has just said what is forgotten.
    `began`: on `time.perf_counter`; the original's features were stored since then,
    or opened.
    """
    seed, opened = problem.seed, time.perf_counter() - began
    folder = _checkpoint_dir(ctx, seed, method)
    # Of these data: steps made with others are not gone on from.
    steps = folder / f"steps-{ctx.data.fingerprint[:12]}"
    outcome, told = _run_method(ctx, problem, method, steps, stage)
    params = {**(problem.params or {}), **outcome.params}
    checkpoint.save(
        folder / "params", outcome.steps, params, {"method": method, "seed": seed}
    )
    start = time.perf_counter()
    seconds = dict(outcome.seconds)
    seconds["unlearn"] = seconds["start"] + seconds["steps"]
    seconds["features"] = opened
    if method == "original":
        trained = problem._replace(params=ctx.executor.replicate(params))
        problem = problem._replace(store=_open_feature_store(ctx, trained, stage))
        seconds["features"] = time.perf_counter() - start
        if not len(problem.sets.unlearn):
            problem = problem._replace(sets=_draw_after_training(ctx, problem))
        start = time.perf_counter()
    # Where trunk and text branch are the original's, so is what they say of each row.
    same = method == "original" or not set(outcome.params) - set(TAIL)
    table = problem.store.as_table(ctx.table) if same else ctx.table
    results = predictions.predict_all_splits(
        ctx.forward, params, table, ctx.data, problem.sets
    )
    seconds["evaluate"] = time.perf_counter() - start
    seconds["total"] = time.perf_counter() - began
    if is_primary():
        path = ctx.workdir / "outputs" / f"{method}-{seed}.npz"
        path.parent.mkdir(exist_ok=True)
        predictions.save_predictions(path, results)
        problem = problem._replace(method=method)
        row = rows.build_result(ctx, problem, outcome, results, seconds, told)
        rows.write_result(rows.result_path(ctx.workdir, seed, method), row)
    checkpoint.remove(steps)
    barrier(f"{method}-{seed}")
    return problem.sets


def _run_method(ctx: RunContext, problem, method, steps, stage):
    """What comes of a method, and what is told of each of its requests."""
    if method in REFERENCES or ctx.config.unlearn.num_requests == 1:
        return ctx.loop.run(method, METHODS[method], problem, steps, stage), []
    return requests.run_requests(ctx, problem, method, steps, stage)


def _draw_after_training(ctx: RunContext, problem) -> Sets:
    """What the original, now trained, is to forget; written down as for other rules."""
    sets = draw_sets(ctx, problem.seed, problem.store)
    workdirs.write_if_changed(workdirs.unlearn_set_files(ctx, problem.seed, sets))
    return sets
