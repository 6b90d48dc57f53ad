"""The tiers of an audit, `--audit TIER`, and what each one measures.

* `smoke`: all measurements that need only stored outputs.
* `standard`: also a second reference as control, similarity of embeddings, an attack
  with the text masked, and relearning.
* `rigorous`: also attacks with shadow models; every method is run on each of them.

Every measurement is stored as a record (`records.py`), so that a preempted run can
resume. The records are merged into audit.json.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ccu_jax.audits.model_probes import ModelProbes
from ccu_jax.audits.records import TIERS, RecordFile, locate_record
from ccu_jax.audits.shadow_audit import MIN_SHADOWS_FOR_DISTANCES, ShadowPool
from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import all_agree, barrier, wait_until_visible
from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import load_predictions
from ccu_jax.methods import CONTROL, REFERENCE, REFERENCES
from ccu_jax.runs import forecast, stages
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.results import outputs_path
from ccu_jax.unlearn_sets.splits import Sets

_MODEL_TIERS = TIERS[1:]  # the tiers that need the models themselves
_SMOKE_S, _SMOKE_ROW_S = 0.1, 3e-4  # seconds per model, and per model and row


def list_required_methods(tier: str, methods: Sequence[str]) -> list[str]:
    """Returns `methods` plus the reference and control that the tier requires."""
    added = (REFERENCE, CONTROL) if tier in _MODEL_TIERS else ()
    return list(dict.fromkeys((*methods, *added)))


def list_stage_titles(tier: str, seeds: Sequence[int]) -> list[str]:
    """Returns the titles of the stages that a tier adds to a run."""
    return [f"seed {seed}: audit" for seed in seeds if tier in _MODEL_TIERS]


def check_tier(config: Config, tier: str) -> None:
    """Raises UserError if a tier does not support the requests or the batch size."""
    if tier == "rigorous" and config.unlearn.num_requests > 1:
        raise UserError(
            f"--audit rigorous: unlearn.num_requests={config.unlearn.num_requests} is "
            "not supported, because shadow models unlearn all rows at once; use "
            "--audit standard"
        )
    if tier in _MODEL_TIERS:  # relearning uses the batch size of finetune
        check_batches(config, ["finetune"], jax.device_count())


def check_outputs(ctx: RunContext, methods: Sequence[str]) -> None:
    """Raises UserError before a long audit if an output is missing or damaged."""
    for seed in ctx.config.seeds:
        for method in methods:
            load_predictions(outputs_path(ctx.workdir, seed, method))


def describe_duration(
    ctx: RunContext, tier: str, methods: Sequence[str], num_shadows: int
) -> str | None:
    """Formats the expected duration of an audit; None if nothing is left to measure."""
    if tier == "none":
        return None
    pending = {
        name: [
            (seed, method)
            for seed in ctx.config.seeds
            for method in methods
            if not _locate_record(ctx, name, method, seed, num_shadows).is_cached()
        ]
        for name in TIERS[: TIERS.index(tier) + 1]
    }
    if all_agree(not pending[tier]):
        return None
    seconds = len(pending["smoke"]) * (_SMOKE_S + _SMOKE_ROW_S * len(ctx.data.id))
    if tier == "smoke":
        return f"audit, smoke: {forecast.format_forecast(seconds)}"
    speed = forecast.measure_speed(ctx)
    probe_s = 2 * speed.evaluation_s + 0.4 * speed.training_s
    seconds += len(pending["standard"]) * probe_s
    for seed in {seed for seed, _ in pending.get("rigorous", [])}:
        folder = ctx.workdir / "shadows" / str(seed)
        num_missing = max(num_shadows - len(list(folder.glob("[0-9]*/0"))), 0)
        seconds += num_missing * (speed.training_s + speed.evaluation_s)
    for _, method in pending.get("rigorous", []):
        if method not in REFERENCES:
            # Shadow models have no stored features: each method computes them.
            method_s = speed.method_s(method) + speed.evaluation_s
            seconds += num_shadows * method_s + forecast.COMPILE_S
    text = f"audit, {tier}: {forecast.format_forecast(seconds)}"
    if tier == "rigorous" and num_shadows < MIN_SHADOWS_FOR_DISTANCES:
        option = f"--shadows {MIN_SHADOWS_FOR_DISTANCES}"
        text += f" (without forgetting score and KLOM, which need {option})"
    return text


def audit_models(
    ctx: RunContext,
    seed: int,
    sets: Sets,
    methods: Sequence[str],
    tier: str,
    num_shadows: int,
) -> None:
    """Measures and stores the missing records of the tiers above `smoke` for a seed.

    All methods must be finished.
    """
    if tier not in _MODEL_TIERS:
        return
    measures: dict[str, Callable[[str], dict[str, Any]]] = {}

    def complete_record(tier: str, method: str) -> None:
        file = _locate_record(ctx, tier, method, seed, num_shadows)
        if wait_until_visible(file.path, file.is_cached):
            return
        if ctx.data.purged:
            raise UserError(
                f"{ctx.workdir}: the unlearned images were purged, so models can no "
                "longer be audited; use --audit smoke to show earlier results"
            )
        file.compute_and_store(measures[tier], method)
        barrier(file.path.name)

    with ctx.reporter.stage(list_stage_titles(tier, [seed])[0]) as stage:
        # A purged workdir has only the records of earlier audits, not the original.
        if not ctx.data.purged:
            problem = stages.build_problem_with_original(ctx, seed, sets, stage)
            measures["standard"] = ModelProbes(ctx, problem).measure
            if tier == "rigorous":
                pool = ShadowPool(ctx, problem, num_shadows, stage.report_progress)
                measures["rigorous"] = pool.measure
        for index, method in enumerate(methods):
            stage.report_progress("model probes", index, len(methods))
            complete_record("standard", method)
        stage.report_progress("model probes", len(methods), len(methods))
        for method in methods if tier == "rigorous" else ():
            complete_record("rigorous", method)


def _locate_record(
    ctx: RunContext, tier: str, method: str, seed: int, num_shadows: int
) -> RecordFile:
    settings = {"shadows": num_shadows} if tier == "rigorous" else {}
    return locate_record(ctx.workdir, tier, method, seed, **settings)
