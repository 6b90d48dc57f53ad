"""The tiers of an audit, `--audit TIER`: what each one measures.

* `smoke`: everything that can be computed from stored outputs.
* `standard`: also a second reference as control, similarity of embeddings, an attack
  with the text masked, and relearning.
* `rigorous`: also attacks with shadow models, on each of which every method is run.

Each measurement is stored as a record (`records.py`), from which a preempted run
resumes and audit.json is compiled (`collection.py`).
"""

import time
from collections.abc import Sequence
from typing import Any

import jax

from ccu_jax.audits import model_probes, records
from ccu_jax.audits.collection import ReportProgress, compared_outputs
from ccu_jax.audits.relearning import relearn
from ccu_jax.audits.shadow_audit import MIN_SHADOWS_FOR_DISTANCES, ShadowPool
from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import all_agree
from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.methods import CONTROL, REFERENCE, REFERENCES, Problem
from ccu_jax.models import Params
from ccu_jax.runs import forecast, stages
from ccu_jax.runs.context import RunContext
from ccu_jax.unlearn_sets.splits import Sets

_COMPARED = ("original", REFERENCE, CONTROL)  # the models that all are compared with
_MODEL_TIERS = ("standard", "rigorous")  # the tiers that need the models themselves
_SMOKE_S, _SMOKE_ROW_S = 0.1, 3e-4  # duration per model and per row of it


def required_methods(tier: str, methods: Sequence[str]) -> list[str]:
    """Returns the methods of a run and those that a tier compares them with."""
    added = (REFERENCE, CONTROL) if tier in _MODEL_TIERS else ()
    return list(dict.fromkeys((*methods, *added)))


def stage_titles(tier: str, seeds: Sequence[int]) -> list[str]:
    """Returns the titles of the stages that a tier adds to a run."""
    return [_stage_title(seed) for seed in seeds] if tier in _MODEL_TIERS else []


def check_tier(config: Config, tier: str) -> None:
    """Checks that a tier can be run with a configuration.

    Raises:
        UserError: it cannot.
    """
    if tier == "rigorous" and config.unlearn.num_requests > 1:
        raise UserError(
            f"--audit rigorous: unlearn.num_requests={config.unlearn.num_requests} is "
            "not supported, because shadow models unlearn all rows at once; use "
            "--audit standard"
        )
    if tier in _MODEL_TIERS:  # relearning uses the batch size of finetune
        check_batches(config, ["finetune"], jax.device_count())


def check_outputs(ctx: RunContext, methods: Sequence[str]) -> None:
    """Checks that all outputs can be read, before anything long is started.

    Raises:
        UserError: a file is missing or damaged.
    """
    for seed in ctx.config.seeds:
        for method in methods:
            records.load_outputs(ctx.workdir, method, seed)


def describe_duration(
    ctx: RunContext, tier: str, methods: Sequence[str], num_shadows: int
) -> str | None:
    """Returns how long an audit will take, or None if nothing is left to measure."""
    if tier == "none":
        return None
    pending = {s: _pending(ctx, s, methods, num_shadows) for s in ctx.config.seeds}
    model_s = _SMOKE_S + _SMOKE_ROW_S * len(ctx.data.id)
    seconds = model_s * sum(len(by_tier["smoke"]) for by_tier in pending.values())
    if all_agree(not any(by_tier[tier] for by_tier in pending.values())):
        return None
    if tier == "smoke":
        return f"audit, smoke: {forecast.format_estimate(seconds)}"
    speed = forecast.measure_speed(ctx)
    for seed, by_tier in pending.items():
        seconds += len(by_tier["standard"]) * (
            2 * speed.evaluation_s + 0.4 * speed.training_s
        )
        if tier == "rigorous" and by_tier["rigorous"]:
            folder = ctx.workdir / "shadows" / str(seed)
            num_trained = len(list(folder.glob("[0-9]*/0")))
            seconds += max(num_shadows - num_trained, 0) * (
                speed.training_s + speed.evaluation_s
            )
            names = [name for name in by_tier["rigorous"] if name not in REFERENCES]
            # Shadow models have no stored features: each method computes them.
            method_s = sum(speed.method_s(name) + speed.evaluation_s for name in names)
            seconds += num_shadows * method_s + forecast.COMPILE_S * len(names)
    text = f"audit, {tier}: {forecast.format_estimate(seconds)}"
    if tier == "rigorous" and num_shadows < MIN_SHADOWS_FOR_DISTANCES:
        text += (
            " (without forgetting score and KLOM, which need --shadows "
            f"{MIN_SHADOWS_FOR_DISTANCES})"
        )
    return text


def _pending(
    ctx: RunContext, seed: int, methods: Sequence[str], num_shadows: int
) -> dict[str, list[str]]:
    """Returns the methods of which a tier has no record, by tier."""

    def missing(tier: str, compared: Sequence[str], **settings: int) -> list[str]:
        names = []
        for method in methods:
            path = records.record_path(ctx.workdir, tier, method, seed)
            key = records.cache_key(ctx.workdir, seed, (method, *compared), **settings)
            if not records.is_cached(path, key):
                names.append(method)
        return names

    return {
        "smoke": missing("smoke", compared_outputs(ctx.workdir, seed)),
        "standard": missing("standard", _COMPARED),
        "rigorous": missing("rigorous", _COMPARED, shadows=num_shadows),
    }


def audit_models(
    ctx: RunContext,
    seed: int,
    sets: Sets,
    methods: Sequence[str],
    tier: str,
    num_shadows: int,
) -> None:
    """Makes the records of a seed that need models, if the tier has any.

    Args:
        ctx: the context of the run.
        seed: of the run.
        sets: of the seed.
        methods: to audit; all are finished.
        tier: one of `flags.AUDIT_TIERS`.
        num_shadows: number of shadow models.
    """
    if tier not in _MODEL_TIERS:
        return
    with ctx.reporter.stage(_stage_title(seed)) as stage:
        # A purged folder has no original, only the records of earlier audits.
        problem = None
        if not ctx.data.purged:
            problem = stages.problem_with_original(ctx, seed, sets, stage)
        _probe_models(ctx, seed, problem, methods, stage.report_progress)
        if tier == "rigorous":
            _audit_with_shadows(
                ctx, seed, problem, methods, num_shadows, stage.report_progress
            )


def _probe_models(
    ctx: RunContext,
    seed: int,
    problem: Problem | None,
    methods: Sequence[str],
    report_progress: ReportProgress,
) -> None:
    """Makes the records of the standard tier."""
    embedded: dict[str, tuple[Params, model_probes.Embeddings]] = {}

    def embed(name: str) -> tuple[Params, model_probes.Embeddings]:
        if name not in embedded:
            params = stages.load_params(ctx, seed, name)
            images = _require_images(ctx, problem)
            embedded[name] = params, model_probes.embed(images, params, ctx.data.group)
        return embedded[name]

    def measure(method: str) -> dict[str, Any]:
        _require_images(ctx, problem)
        start = time.perf_counter()
        params, embeddings = embed(method)
        result = model_probes.compare_embeddings(
            embeddings, *(embed(name)[1] for name in _COMPARED)
        )
        if method not in _COMPARED:
            del embedded[method]
        middle = time.perf_counter()
        folder = ctx.workdir / "audits" / f"{method}-{seed}-steps"
        relearned = relearn(ctx, _require_images(ctx, problem), params, folder)
        result["relearning"] = relearned._asdict()
        end = time.perf_counter()
        return result | {
            "costs_s": {"model probes": middle - start, "relearning": end - middle}
        }

    for index, method in enumerate(methods):
        report_progress("model probes", index, len(methods))
        key = records.cache_key(ctx.workdir, seed, (method, *_COMPARED))
        path = records.record_path(ctx.workdir, "standard", method, seed)
        records.load_or_compute(path, key, lambda method=method: measure(method))
    report_progress("model probes", len(methods), len(methods))


def _audit_with_shadows(
    ctx: RunContext,
    seed: int,
    problem: Problem | None,
    methods: Sequence[str],
    num_shadows: int,
    report_progress: ReportProgress,
) -> None:
    """Makes the records of the rigorous tier."""
    batch_size = ctx.config.run.shadow_batch_size
    if not batch_size:  # CPUs gain nothing from several models in one program
        batch_size = 1 if jax.default_backend() == "cpu" else num_shadows
    pool: ShadowPool | None = None

    def load(name: str) -> Predictions:
        return records.load_outputs(ctx.workdir, name, seed)

    def measure(method: str) -> dict[str, Any]:
        nonlocal pool
        if pool is None:
            images = _require_images(ctx, problem)
            pool = ShadowPool(ctx, images, num_shadows, batch_size, report_progress)
        models = {"model": load(method), **{name: load(name) for name in _COMPARED}}
        start = time.perf_counter()
        result = pool.audit(method, models)
        costs = {"method on shadow models": time.perf_counter() - start}
        # All methods share the shadow models: the first record has their time.
        costs["shadow models"], pool.seconds = pool.seconds, 0.0
        return {"pool": result, "costs_s": costs}

    for method in methods:
        compared = (method, *_COMPARED)
        key = records.cache_key(ctx.workdir, seed, compared, shadows=num_shadows)
        path = records.record_path(ctx.workdir, "rigorous", method, seed)
        records.load_or_compute(path, key, lambda method=method: measure(method))


def _require_images(ctx: RunContext, problem: Problem | None) -> Problem:
    """Returns the problem; raises UserError if its images were purged."""
    if problem is None:
        raise UserError(
            f"{ctx.workdir}: the unlearned images were purged, so nothing more can be "
            "measured; use --audit smoke to show what was measured before"
        )
    return problem


def _stage_title(seed: int) -> str:
    return f"seed {seed}: audit"
