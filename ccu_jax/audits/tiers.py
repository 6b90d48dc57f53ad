"""`--audit TIER`: what was forgotten, and what was not, with intervals and a control.

* `smoke`, with every run: all that stored outputs tell.
* `standard`: also a second reference as control, embeddings, the fused view without
  text, and relearning.
* `rigorous`: also a pool of shadow models, on which every method is run.

What was measured lies in `audits/`, one file for each tier, method and seed; a run that
was cut off goes on from there. `audit.json` and `audit.md` are made of these files.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax

from ccu_jax.audits import model_probes as probing
from ccu_jax.audits import offline as outputs
from ccu_jax.audits import records as audit_records
from ccu_jax.audits import verdict
from ccu_jax.audits.offline import Given
from ccu_jax.audits.shadow_audit import LEAST, Pool
from ccu_jax.config.schema import check_batches
from ccu_jax.distributed.hosts import all_agree, barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.methods import REFERENCE, REFERENCES
from ccu_jax.runs import forecast, stages
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext
from ccu_jax.storage.files import write_atomically

CONTROL = f"{REFERENCE}_2"
_COMPARED = ("original", REFERENCE, CONTROL)  # with what every model is
_SMOKE_S = 0.1, 3e-4  # for a model, and for each of its rows
_MODELS = ("standard", "rigorous")  # tiers that ask for the models themselves


def needed(tier: str, methods: list[str]) -> list[str]:
    """The methods of a run with the models that its audit asks for."""
    more = (REFERENCE, CONTROL) if tier in _MODELS else ()
    return list(dict.fromkeys((*methods, *more)))


def titles(tier: str, seeds) -> list[str]:
    """The stages that an audit adds to a run."""
    return [_title(seed) for seed in seeds] if tier in _MODELS else []


def check(config, tier: str) -> None:
    """Refuses what a tier cannot be asked of, before anything is run.

    Raises:
        UserError: it tells nothing of requests, or batches do not fit the devices.
    """
    if tier == "rigorous" and config.unlearn.num_requests > 1:
        raise UserError(
            "--audit rigorous: shadows forget at once, so that they tell nothing of "
            f"unlearn.num_requests={config.unlearn.num_requests}; give another tier"
        )
    if tier in _MODELS:  # relearning goes by the batches of finetune
        check_batches(config, ["finetune"], jax.device_count())


def forecast_of(
    ctx: RunContext, tier: str, methods: list[str], shadows: int
) -> str | None:
    """How long an audit takes, told before it starts; None where it takes none."""
    if tier == "none":
        return None
    # What is kept is not measured again.
    seeds = ctx.config.seeds
    todo = {seed: _left(ctx.workdir, seed, methods, shadows) for seed in seeds}
    each = _SMOKE_S[0] + _SMOKE_S[1] * len(ctx.data.id)
    seconds = each * sum(len(left["smoke"]) for left in todo.values())
    if all_agree(not any(left[tier] for left in todo.values())):
        return None
    if tier == "smoke":
        return f"audit, smoke: {forecast.format_estimate(seconds)}"
    known = forecast.measure_speed(ctx)
    for seed, left in todo.items():
        seconds += len(left["standard"]) * (
            2 * known.evaluation_s + 0.4 * known.training_s
        )
        if tier == "rigorous" and left["rigorous"]:
            there = len(list((ctx.workdir / "shadows" / str(seed)).glob("[0-9]*/0")))
            seconds += max(shadows - there, 0) * (known.training_s + known.evaluation_s)
            run = [m for m in left["rigorous"] if m not in REFERENCES]
            # Features are not stored for a shadow, and the first one compiles.
            each = sum(known.method_s(name) + known.evaluation_s for name in run)
            seconds += shadows * each + forecast.COMPILE_S * len(run)
    told = f"audit, {tier}: {forecast.format_estimate(seconds)}"
    if tier == "rigorous" and shadows < LEAST:
        told += f" (no forgetting score, no KLOM: these need --shadows {LEAST})"
    return told


def _left(workdir, seed, methods, shadows) -> dict[str, list[str]]:
    """By tier, the methods of which nothing is kept that counts."""

    def lacks(tier, method, names, **more):
        path = audit_records.place(workdir, tier, method, seed)
        mark = audit_records.mark(workdir, seed, (method, *names), **more)
        return not audit_records.has(path, mark)

    there = _there(workdir, seed)
    return {
        "smoke": [m for m in methods if lacks("smoke", m, there)],
        "standard": [m for m in methods if lacks("standard", m, _COMPARED)],
        "rigorous": [
            m for m in methods if lacks("rigorous", m, _COMPARED, shadows=shadows)
        ],
    }


def readable(ctx: RunContext, methods: list[str]) -> None:
    """Looks at all outputs that an audit will need, before anything long is begun.

    Raises:
        UserError: one is missing or damaged.
    """
    for seed in ctx.config.seeds:
        for method in methods:
            audit_records.load(ctx.workdir, method, seed)


def measure(
    ctx: RunContext, seed: int, sets, methods: list[str], tier: str, shadows: int
):
    """Everything of a seed that asks for models, if the tier asks for any.

    Args:
        ctx: the context of the run.
        seed: of the run.
        sets: of the seed.
        methods: finished ones.
        tier: one of `flags.AUDIT_TIERS`.
        shadows: size of the pool.
    """
    if tier not in _MODELS:
        return
    with ctx.reporter.stage(_title(seed)) as stage:
        # Of a purged folder there is no original any more: what is kept is all.
        purged = ctx.data.purged
        problem = (
            None if purged else stages.problem_with_original(ctx, seed, sets, stage)
        )
        _probes(ctx, seed, problem, methods, stage.report_progress)
        if tier == "rigorous":
            _pool(ctx, seed, problem, methods, shadows, stage.report_progress)


def write(ctx: RunContext, tell: Callable) -> list[dict[str, Any]]:
    """`audit.json`, of all that was measured in the folder.

    Every process calls this. What is to be measured of outputs alone the first one
    measures: others may not see all of the folder yet.

    Returns:
        A record for each method, with its verdict over all seeds; the first process.
    """
    found = collected(ctx.workdir, tell) if is_primary() else []
    if found:
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        write_atomically(ctx.workdir / "audit.json", text.encode())
    barrier("audit")
    return found


def stored(workdir) -> list[dict[str, Any]]:
    """What was measured before, as `write` gives it, for who does not measure now."""
    return collected(workdir, measure=False)


def collected(
    workdir,
    tell: Callable = lambda *told: None,
    measure: bool = True,
) -> list[dict[str, Any]]:
    """The records of all finished methods of a folder.

    Args:
        workdir: of a run.
        tell: told what is done, and how much of how much.
        measure: whether to compute what is not kept, or to leave it out.
    """
    every = rows.load_all_results(workdir)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for done, row in enumerate(every):
        tell("audit", done, len(every))
        if record := _record(workdir, row, measure):
            by_method.setdefault(row["method"], []).append(record)
    tell("audit", len(every), len(every))
    return [
        {
            "method": method,
            "edition": records[0].pop("edition", None),
            "verdict": verdict.verdict_over_seeds(records, method == REFERENCE),
            "seeds": records,
        }
        for method, records in by_method.items()
    ]


def _record(workdir, row, measure):
    """All that is known of a method and seed; None: nothing, without measuring."""
    method, seed = row["method"], row["seed"]
    compared = _there(workdir, seed)
    mark = audit_records.mark(workdir, seed, (method, *compared))

    def compute():
        load = {name: audit_records.load(workdir, name, seed) for name in compared}
        model = audit_records.load(workdir, method, seed)
        return outputs.audit(
            Given(model, load["original"], load.get(REFERENCE), load.get(CONTROL))
        )

    path = audit_records.place(workdir, "smoke", method, seed)
    if measure:
        found = audit_records.kept(path, mark, compute, together=False)
    elif (found := audit_records.of_model(path, method, mark)) is None:
        return None
    told = {name: row.get(name) for name in ("edition", "diverged", "commit")}
    record = {"seed": seed, **told, **found["found"]}
    seconds, costs = {"smoke": found["seconds"]}, record["costs_s"]
    for tier in _MODELS:
        if more := audit_records.of_model(
            audit_records.place(workdir, tier, method, seed), method, mark
        ):
            record |= more["found"]
            seconds[tier] = more["seconds"]
            costs = costs | more["found"]["costs_s"]
    return record | {"seconds": seconds, "costs_s": costs}


def _there(workdir, seed) -> tuple[str, ...]:
    """What a model is compared with, of what there is."""
    references = [
        name
        for name in (REFERENCE, CONTROL)
        if audit_records.outputs_of(workdir, name, seed).exists()
    ]
    return ("original", *references)


def _probes(ctx: RunContext, seed, problem, methods, tell: Callable) -> None:
    """Embeddings, the fused view without text, relearning: of every method."""
    looked: dict[str, Any] = {}

    def look(method):
        if method not in looked:
            params = stages.load_params(ctx, seed, method)
            found = probing.look(problem, params, ctx.data.group)
            looked[method] = params, found
        return looked[method]

    for done, method in enumerate(methods):
        tell("looking at models", done, len(methods))
        mark = audit_records.mark(ctx.workdir, seed, (method, *_COMPARED))

        def compute(method=method):
            _refuse_purged(ctx)
            began = time.perf_counter()
            params, mine = look(method)
            found = probing.compare(mine, *(look(name)[1] for name in _COMPARED))
            if method not in _COMPARED:
                del looked[method]
            middle = time.perf_counter()
            found["relearning"] = probing.relearned(ctx, problem, method, params)
            costs = middle - began, time.perf_counter() - middle
            costs = dict(zip(("looking at models", "relearning"), costs, strict=True))
            return found | {"costs_s": costs}

        audit_records.kept(
            audit_records.place(ctx.workdir, "standard", method, seed), mark, compute
        )
    tell("looking at models", len(methods), len(methods))


def _pool(ctx: RunContext, seed, problem, methods, shadows, tell: Callable) -> None:
    """U-LiRA and what else a pool of shadows tells: of every method."""
    together = ctx.config.run.shadow_batch_size
    if not together:  # CPUs gain nothing from several models in one program
        together = 1 if jax.default_backend() == "cpu" else shadows
    pool = None

    def load(name):
        return audit_records.load(ctx.workdir, name, seed)

    for method in methods:
        names = method, *_COMPARED
        mark = audit_records.mark(ctx.workdir, seed, names, shadows=shadows)

        def compute(method=method):
            nonlocal pool
            _refuse_purged(ctx)
            pool = pool or Pool(ctx, problem, shadows, together, tell)
            models = {"model": load(method)} | {name: load(name) for name in _COMPARED}
            began = time.perf_counter()
            found = pool.audit(method, models)
            costs = {"method on shadows": time.perf_counter() - began}
            # Shadows serve all methods: their time is told apart, and once.
            costs["shadow models"], pool.seconds = pool.seconds, 0.0
            return {"pool": found, "costs_s": costs}

        audit_records.kept(
            audit_records.place(ctx.workdir, "rigorous", method, seed), mark, compute
        )


def _refuse_purged(ctx: RunContext):
    if ctx.data.purged:
        raise UserError(
            f"the pictures to forget were purged from {ctx.workdir}: what was not "
            "measured before cannot be now; --audit smoke shows what was"
        )


def _title(seed):
    return f"seed {seed}: audit"
