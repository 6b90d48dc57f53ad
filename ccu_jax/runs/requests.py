"""Runs a method on a sequence of unlearning requests.

The unlearn set is split into requests. Each request starts from the model that the
previous one returned. Its rows are the unlearn set; rows of later requests are in the
retain set, rows of earlier requests in neither. After each request the model is
evaluated on all rows unlearned so far.
"""

import itertools
import pathlib
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ccu_jax.config.schema import Unlearn
from ccu_jax.data import Dataset
from ccu_jax.distributed.device_tables import Table
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.evaluate.forward import Forward
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.methods import METHODS, Problem
from ccu_jax.models import TAIL, VIEWS, Params
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import unlearning_seconds
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets.splits import Sets, list_unlearned_groups

_SEED_STRIDE = 1_000_003  # between requests; the first one has the seed of the run


def split_requests(
    data: Dataset, config: Unlearn, seed: int, sets: Sets
) -> list[np.ndarray]:
    """Splits the unlearn set into requests with about equal numbers of images.

    No group is divided, and each request has at least one image. Returns the sorted row
    numbers of each request.

    Raises UserError if there are fewer groups with images than requests.
    """
    groups = list_unlearned_groups(data, sets, seed, config.duplicates)
    num_images = np.array([data.has_image[rows].sum() for rows in groups])
    # A group without an image goes with the group before it.
    with_image = np.flatnonzero(num_images)
    if len(with_image) < config.num_requests:
        raise UserError(
            f"unlearn.num_requests={config.num_requests}: the unlearn set of seed "
            f"{seed} has only {len(with_image)} groups with images; use at most that "
            "many requests"
        )
    ends = np.cumsum(num_images[with_image])
    starts = [0]
    for number in range(1, config.num_requests):
        target = ends[-1] * number / config.num_requests
        nearest = 1 + int(np.abs(ends - target).argmin())
        max_start = len(with_image) - (config.num_requests - number)
        starts.append(min(max(nearest, starts[-1] + 1), max_start))
    bounds = [0, *with_image[starts[1:]], len(groups)]
    pairs = itertools.pairwise(bounds)
    return [np.sort(np.concatenate(groups[first:last])) for first, last in pairs]


class UpdatedStore(NamedTuple):
    """A feature store that returns the current model's logits as the original's.

    Otherwise a method that preserves the logits of retained rows would restore what
    earlier requests have unlearned. Logits are computed on demand, and the time counts
    towards the method's.
    """

    store: FeatureStore
    forward: Forward
    params: Params  # with the original's trunk and text tower
    table: Table

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the given rows of all columns, like `FeatureStore.take`."""
        columns = self.store.take(rows)
        table = {name: columns[name] for name in ("features", "h_text")}
        table |= {n: np.asarray(self.table[n])[rows] for n in ("has_image", "has_text")}
        outputs = self.forward.compute_outputs(self.params, table, np.arange(len(rows)))
        return columns | {f"original_{view}": outputs[view] for view in VIEWS}


def run_requests(
    ctx: RunContext, problem: Problem, method: str, folder: pathlib.Path, stage: Stage
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Runs a method on all requests; finished requests are restored, not repeated.

    Returns:
        The merged outcome of all requests, and a record of each: `count`, `images`,
        `steps`, `seconds`, `attack_auc` (of `all` rows unlearned so far, of the `first`
        request, and of `this` request) and `scores` on the test set.
    """
    requests = split_requests(ctx.data, ctx.config.unlearn, problem.seed, problem.sets)
    params = problem.params or {}
    trained: set[str] = set()  # modules that any request has trained
    outcomes, records = [], []
    for number, rows in enumerate(requests):
        stage.report_progress(f"request {number + 1}/{len(requests)}", 0, 0)
        later = np.concatenate([problem.sets.retain, *requests[number + 1 :]])
        store = problem.store
        if store is not None and number > 0:
            updated = UpdatedStore(store, problem.forward, params, problem.table)
            is_valid = trained <= set(TAIL)  # the trunk is still the original's
            # Methods only call `take`.
            store = cast(FeatureStore, updated) if is_valid else None
        request = problem._replace(
            sets=problem.sets._replace(retain=np.sort(later), unlearn=rows),
            params=params,
            seed=problem.seed + _SEED_STRIDE * number,
            store=store,
        )
        request_folder = folder / f"request-{number + 1}"
        outcome = _run_or_restore(ctx, request, method, request_folder, stage)
        outcomes.append(outcome)
        params = ctx.executor.replicate(params | outcome.params)
        trained |= set(outcome.params)
        after = problem._replace(params=params)
        so_far = requests[: number + 1]
        records.append(_build_record(ctx, after, so_far, outcome, trained))
        if outcome.diverged:
            break
    changed = {module: params[module] for module in sorted(trained)}
    return _merge_outcomes(outcomes, changed), records


def _merge_outcomes(outcomes: list[Outcome], params: Params) -> Outcome:
    """Sums steps and seconds of all outcomes; `params` are those after the last."""
    diverged = outcomes[-1].diverged
    clocks = outcomes[0].seconds
    return Outcome(
        params=params,
        seconds={clock: sum(x.seconds[clock] for x in outcomes) for clock in clocks},
        steps=sum(outcome.steps for outcome in outcomes),
        diverged=diverged and f"request {len(outcomes)}: {diverged}",
    )


def _run_or_restore(
    ctx: RunContext, problem: Problem, method: str, folder: pathlib.Path, stage: Stage
) -> Outcome:
    """Runs a method on one request, or restores the outcome of a finished one."""
    before = problem.params or {}
    identity = {"from": checkpoint.hash_tree(before)}
    identity["fingerprint"] = ctx.data.fingerprint
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    saved = checkpoint.restore(folder / "params", shapes, ctx.reporter.warn)
    if saved is not None and identity.items() <= saved.metadata.items():
        facts = saved.metadata
        params = {module: saved.tree[module] for module in facts["modules"]}
        return Outcome(params, facts["seconds"], saved.step, facts["diverged"])
    outcome = ctx.loop.run(method, METHODS[method], problem, folder / "steps", stage)
    facts = identity | {
        "modules": sorted(outcome.params),
        "seconds": outcome.seconds,
        "diverged": outcome.diverged,
    }
    params = {**before, **outcome.params}
    checkpoint.save(folder / "params", outcome.steps, params, facts)
    return outcome


def _build_record(
    ctx: RunContext,
    problem: Problem,
    requests: list[np.ndarray],
    outcome: Outcome,
    trained: set[str],
) -> dict[str, Any]:
    """Builds the record of the last request: its cost and the model's evaluation."""
    unlearned = np.sort(np.concatenate(requests))
    empty = unlearned[:0]
    sets = problem.sets._replace(retain=empty, unlearn=unlearned, validation=empty)
    predicted = ctx.predict(problem._replace(sets=sets), problem.original, trained)
    attacked_rows = {"all": unlearned, "first": requests[0], "this": requests[-1]}
    return {
        "count": len(requests[-1]),
        "images": int(ctx.data.has_image[requests[-1]].sum()),
        "steps": outcome.steps,
        "seconds": unlearning_seconds(outcome),
        "attack_auc": {
            name: _attack_auc(predicted, ctx.data.id[rows])
            for name, rows in attacked_rows.items()
        },
        "scores": {"test": predictions.compute_scores(predicted)["test"]},
        "diverged": outcome.diverged,
    }


def _attack_auc(predicted: Predictions, ids: np.ndarray) -> dict[str, float | None]:
    """Returns the attack AUC by view, with only the rows `ids` of the unlearn set."""
    is_ignored = (predicted.split == "unlearn") & ~np.isin(predicted.id, ids)
    split = np.where(is_ignored, "", predicted.split)
    return predictions.attack_auc(predicted._replace(split=split))
