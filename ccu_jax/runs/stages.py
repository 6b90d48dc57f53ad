"""Runs the stages of a seed: the original, the references and the methods."""

import functools
import pathlib
import time

import jax

from ccu_jax.data import corruptions
from ccu_jax.distributed.hosts import barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store, memorization
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.evaluate.predictions import load_predictions, save_predictions
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.models import Params
from ccu_jax.runs import requests, results, workdir
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import Result, outputs_path, result_path
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets import splits
from ccu_jax.unlearn_sets.rules import DATA_DEPENDENT, parse_rule
from ccu_jax.unlearn_sets.splits import Sets


def stage_title(seed: int, method: str) -> str:
    """Returns the title of a stage, as shown in progress lines."""
    return f"seed {seed}: {method}"


def load_result_if_finished(ctx: RunContext, seed: int, method: str) -> Result | None:
    """Returns the result of a stage, None if unfinished; see `load_if_finished`."""
    return results.load_if_finished(ctx, result_path(ctx.workdir, seed, method))


def draw_sets(ctx: RunContext, seed: int, store: FeatureStore | None = None) -> Sets:
    """Draws the sets of a seed.

    The rule "memorized" needs the features of an original model (`store`). Without
    them, `unlearn` is empty, and the original is trained on the other sets.

    Raises:
        UserError: the rule does not fit the data, or gives fewer groups than requests.
    """
    config = ctx.config.unlearn
    # Once the images are purged, a rule that needs them cannot be followed again.
    is_repeatable = parse_rule(config.rule).kind not in DATA_DEPENDENT
    if not is_repeatable and load_result_if_finished(ctx, seed, "original"):
        return workdir.load_evaluated_sets(ctx, seed)
    args = ctx.data, config.rule, seed, config.holdout_fraction, config.duplicates
    sets = splits.draw_sets(*args)
    if store is not None:
        estimate = memorization.estimate_memorization(
            ctx.data, store, sets.retain, sets.unseen, seed
        )
        sets = splits.draw_sets(*args, estimate)
        summary = memorization.describe(ctx.data, estimate, sets)
        ctx.reporter.log(f"seed {seed}: {summary}")
    if len(sets.unlearn):  # raises an error if there are fewer groups than requests
        requests.split_requests(ctx.data, config, seed, sets)
    return sets


def _build_problem(ctx: RunContext, seed: int, sets: Sets) -> Problem:
    """Builds the problem of a seed, without the original's parameters and features."""
    order = ctx.config.corruptions.order
    return Problem(
        config=ctx.config,
        model=ctx.model,
        forward=ctx.forward,
        executor=ctx.executor,
        table=ctx.table,
        sets=sets,
        multi_label=ctx.data.multi_label,
        params=None,
        seed=seed,
        stream_positions=corruptions.stream_positions(ctx.data, order),
    )


def build_problem_with_original(
    ctx: RunContext, seed: int, sets: Sets, stage: Stage
) -> Problem:
    """Returns the problem of a seed with its finished original and features."""
    params = load_params(ctx, seed, "original")
    store = _open_feature_store(ctx, seed, params, stage)
    sets = sets if len(sets.unlearn) else draw_sets(ctx, seed)
    return _build_problem(ctx, seed, sets)._replace(params=params, store=store)


def run_seed(ctx: RunContext, seed: int, sets: Sets, methods: list[str]) -> None:
    """Runs the unfinished methods of a seed; `methods` must begin with the original."""
    problem = _build_problem(ctx, seed, sets)
    for method in methods:
        if load_result_if_finished(ctx, seed, method) is not None:
            continue
        if method not in REFERENCES and problem.params is None:
            problem = problem._replace(params=load_params(ctx, seed, "original"))
        with ctx.reporter.stage(stage_title(seed, method)) as stage:
            start_s = time.perf_counter()
            if problem.params is not None and problem.store is None:
                store = _open_feature_store(ctx, seed, problem.params, stage)
                problem = problem._replace(store=store)
            sets = _run_stage(ctx, problem, method, stage, start_s)
            problem = problem._replace(sets=sets)


def load_params(ctx: RunContext, seed: int, method: str) -> Params:
    """Restores and replicates a method's parameters; raises UserError if damaged."""
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    folder = _checkpoint_dir(ctx, seed, method) / "params"
    saved = checkpoint.restore(folder, shapes, ctx.reporter.warn)
    if saved is None:
        raise UserError(
            f"{folder}: missing or damaged checkpoint of {method}; remove "
            f"{result_path(ctx.workdir, seed, method)} to train it again"
        )
    return ctx.executor.replicate(saved.tree)


def _checkpoint_dir(ctx: RunContext, seed: int, method: str) -> pathlib.Path:
    return ctx.workdir / "checkpoints" / f"{method}-{seed}"


def _open_feature_store(
    ctx: RunContext, seed: int, params: Params, stage: Stage
) -> FeatureStore:
    folder = _checkpoint_dir(ctx, seed, "original") / "features"
    report = functools.partial(stage.report_progress, "storing features")
    return feature_store.open_or_build(
        folder, ctx.forward, params, ctx.table, seed, ctx.data.fingerprint, report
    )


def _run_stage(
    ctx: RunContext, problem: Problem, method: str, stage: Stage, start_s: float
) -> Sets:
    """Runs one method, evaluates it and writes its model, predictions and result.

    Returns the sets: the rule "memorized" draws them after the original is trained.
    """
    seed, features_s = problem.seed, time.perf_counter() - start_s
    folder = _checkpoint_dir(ctx, seed, method)
    # Named after the data, so that a run never resumes from steps on other data.
    steps = folder / f"steps-{ctx.data.fingerprint[:12]}"
    outcome, records = _run_method(ctx, problem, method, steps, stage)
    params = {**(problem.params or {}), **outcome.params}
    facts = {"method": method, "seed": seed}
    checkpoint.save(folder / "params", outcome.steps, params, facts)
    trained_s, trained = time.perf_counter(), set(outcome.params)
    if method == "original":
        store = _open_feature_store(ctx, seed, ctx.executor.replicate(params), stage)
        problem = problem._replace(store=store)
        features_s = time.perf_counter() - trained_s
        if not len(problem.sets.unlearn):
            sets = draw_sets(ctx, seed, store)
            workdir.write_if_changed(workdir.unlearn_set_files(ctx, seed, sets))
            problem = problem._replace(sets=sets)
        trained_s, trained = time.perf_counter(), set()
    predicted = ctx.predict(problem, params, trained)
    end_s = time.perf_counter()
    if is_primary():
        path = outputs_path(ctx.workdir, seed, method)
        path.parent.mkdir(exist_ok=True)
        save_predictions(path, predicted)
        original = load_predictions(outputs_path(ctx.workdir, seed, "original"))
        solved = problem._replace(method=method)
        result = results.describe_stage(ctx, problem.sets, predicted, original)
        result |= results.build_result(ctx, solved, outcome, predicted, original)
        result["seconds"] |= {
            "features": features_s,
            "evaluate": end_s - trained_s,
            "total": end_s - start_s,
        }
        result["requests"] = records
        results.write_result(result_path(ctx.workdir, seed, method), result)
    checkpoint.remove(steps)
    barrier(f"{method}-{seed}")
    return problem.sets


def _run_method(
    ctx: RunContext, problem: Problem, method: str, steps: pathlib.Path, stage: Stage
) -> tuple[Outcome, list[Result]]:
    """Runs a method; returns its outcome and one record per unlearning request."""
    if method in REFERENCES or ctx.config.unlearn.num_requests == 1:
        return ctx.loop.run(method, METHODS[method], problem, steps, stage), []
    return requests.run_requests(ctx, problem, method, steps, stage)
