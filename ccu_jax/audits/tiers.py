"""The tiers of an audit, `--audit TIER`: what each one measures.

* `smoke`: everything that can be computed from stored outputs.
* `standard`: also a second reference as control, similarity of embeddings, an attack
  with the text masked, and relearning.
* `rigorous`: also attacks with shadow models, on each of which every method is run.

Each measurement is stored as a record (`records.py`), from which a preempted run
resumes and audit.json is compiled (`collection.py`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ccu_jax.audits import model_probes, records
from ccu_jax.audits.collection import ReportProgress, compared_outputs
from ccu_jax.audits.relearning import relearn
from ccu_jax.audits.shadow_audit import MIN_SHADOWS_FOR_DISTANCES, ShadowPool
from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import all_agree
from ccu_jax.errors import UserError
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
    smoke_s = _SMOKE_S + _SMOKE_ROW_S * len(ctx.data.id)
    seconds = smoke_s * sum(len(by_tier["smoke"]) for by_tier in pending.values())
    if all_agree(not any(by_tier[tier] for by_tier in pending.values())):
        return None
    if tier == "smoke":
        return f"audit, smoke: {forecast.format_forecast(seconds)}"
    speed = forecast.measure_speed(ctx)
    for seed, by_tier in pending.items():
        probe_s = 2 * speed.evaluation_s + 0.4 * speed.training_s
        seconds += len(by_tier["standard"]) * probe_s
        if tier == "rigorous" and by_tier["rigorous"]:
            folder = ctx.workdir / "shadows" / str(seed)
            num_missing = max(num_shadows - len(list(folder.glob("[0-9]*/0"))), 0)
            seconds += num_missing * (speed.training_s + speed.evaluation_s)
            names = [name for name in by_tier["rigorous"] if name not in REFERENCES]
            # Shadow models have no stored features: each method computes them.
            method_s = sum(speed.method_s(name) + speed.evaluation_s for name in names)
            seconds += num_shadows * method_s + forecast.COMPILE_S * len(names)
    text = f"audit, {tier}: {forecast.format_forecast(seconds)}"
    needed = MIN_SHADOWS_FOR_DISTANCES
    if tier == "rigorous" and num_shadows < needed:
        text += f" (without forgetting score and KLOM, which need --shadows {needed})"
    return text


def _pending(
    ctx: RunContext, seed: int, methods: Sequence[str], num_shadows: int
) -> dict[str, list[str]]:
    """Returns the methods of which a tier has no record, by tier."""

    def is_missing(tier: str, method: str, *compared: str, **settings: int) -> bool:
        path = records.record_path(ctx.workdir, tier, method, seed)
        key = records.cache_key(ctx.workdir, seed, (method, *compared), **settings)
        return not records.is_cached(path, key)

    existing = compared_outputs(ctx.workdir, seed)
    shadows = {"shadows": num_shadows}
    return {
        "smoke": [m for m in methods if is_missing("smoke", m, *existing)],
        "standard": [m for m in methods if is_missing("standard", m, *_COMPARED)],
        "rigorous": [
            m for m in methods if is_missing("rigorous", m, *_COMPARED, **shadows)
        ],
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

    All methods must be finished.
    """
    if tier not in _MODEL_TIERS:
        return
    with ctx.reporter.stage(_stage_title(seed)) as stage:
        # A purged folder has no original, only the records of earlier audits.
        problem = None
        if not ctx.data.purged:
            problem = stages.problem_with_original(ctx, seed, sets, stage)
        audit = _SeedAudit(ctx, seed, problem, methods, stage.report_progress)
        audit.probe_models()
        if tier == "rigorous":
            audit.attack_with_shadows(num_shadows)


class _SeedAudit(NamedTuple):
    """The records of a seed that need models."""

    ctx: RunContext
    seed: int
    problem: Problem | None
    methods: Sequence[str]
    report_progress: ReportProgress

    def probe_models(self) -> None:
        """Makes the records of the standard tier."""
        ctx = self.ctx
        embedded: dict[str, tuple[Params, model_probes.Embeddings]] = {}

        def embed(name: str) -> tuple[Params, model_probes.Embeddings]:
            if name not in embedded:
                params = stages.load_params(ctx, self.seed, name)
                problem, group = self._require_problem(), ctx.data.group
                embedded[name] = params, model_probes.embed(problem, params, group)
            return embedded[name]

        def measure(method: str) -> dict[str, Any]:
            problem = self._require_problem()
            start = time.perf_counter()
            params, embeddings = embed(method)
            compared = [embed(name)[1] for name in _COMPARED]
            result = model_probes.compare_embeddings(embeddings, *compared)
            if method not in _COMPARED:
                del embedded[method]
            middle = time.perf_counter()
            folder = ctx.workdir / "audits" / f"{method}-{self.seed}-steps"
            result["relearning"] = relearn(ctx, problem, params, folder)._asdict()
            relearning_s = time.perf_counter() - middle
            costs = {"model probes": middle - start, "relearning": relearning_s}
            return result | {"costs_s": costs}

        for index, method in enumerate(self.methods):
            self.report_progress("model probes", index, len(self.methods))
            self._make_record("standard", method, measure)
        self.report_progress("model probes", len(self.methods), len(self.methods))

    def attack_with_shadows(self, num_shadows: int) -> None:
        """Makes the records of the rigorous tier."""
        ctx = self.ctx
        batch_size = ctx.config.run.shadow_batch_size
        if not batch_size:  # CPUs gain nothing from several models in one program
            batch_size = 1 if jax.default_backend() == "cpu" else num_shadows
        pool: ShadowPool | None = None

        def measure(method: str) -> dict[str, Any]:
            nonlocal pool
            problem = self._require_problem()
            if pool is None:
                report = self.report_progress
                pool = ShadowPool(ctx, problem, num_shadows, batch_size, report)
            names = {"model": method, **{name: name for name in _COMPARED}}
            models = {
                key: records.load_outputs(ctx.workdir, name, self.seed)
                for key, name in names.items()
            }
            start = time.perf_counter()
            result = pool.audit(method, models)
            costs = {"method on shadow models": time.perf_counter() - start}
            # All methods share the shadow models: the first record has their time.
            costs["shadow models"], pool.seconds = pool.seconds, 0.0
            return {"pool": result, "costs_s": costs}

        for method in self.methods:
            self._make_record("rigorous", method, measure, shadows=num_shadows)

    def _make_record(
        self,
        tier: str,
        method: str,
        measure: Callable[[str], dict[str, Any]],
        **settings: int,
    ) -> None:
        workdir, compared = self.ctx.workdir, (method, *_COMPARED)
        key = records.cache_key(workdir, self.seed, compared, **settings)
        path = records.record_path(workdir, tier, method, self.seed)
        records.load_or_compute(path, key, lambda: measure(method))

    def _require_problem(self) -> Problem:
        if self.problem is None:
            raise UserError(
                f"{self.ctx.workdir}: the unlearned images were purged, so nothing "
                "can be measured any more; use --audit smoke to show earlier results"
            )
        return self.problem


def _stage_title(seed: int) -> str:
    return f"seed {seed}: audit"
