"""Runs a method on several unlearning requests, one after another.

The unlearn set is split into requests in the order of forgetting. Each request starts
from the model that the previous one left. Its rows are the unlearn set; rows of later
requests are still retained, rows of earlier ones are in neither set. After each request
the model is evaluated on all rows unlearned so far.
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
from ccu_jax.runs.context import RunContext, evaluation_table
from ccu_jax.runs.progress import Stage
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets.splits import Sets, groups_in_order

# Each request has a seed of its own; the first one has the seed of a single request.
_SEED_STRIDE = 1_000_003


def split_requests(
    data: Dataset, config: Unlearn, seed: int, sets: Sets
) -> list[np.ndarray]:
    """Splits the unlearn set into requests with about equal numbers of images.

    No group is split, and each request has at least one image. Row numbers are sorted.

    Raises:
        UserError: there are fewer groups with images than requests.
    """
    groups = groups_in_order(data, sets, seed, config.duplicates)
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
    return [
        np.sort(np.concatenate(groups[first:last]))
        for first, last in itertools.pairwise(bounds)
    ]


class UpdatedStore(NamedTuple):
    """The original's features with the logits of the current model.

    A method that preserves the logits of retained rows would otherwise restore what
    earlier requests have unlearned. Logits are computed on demand, which counts as time
    of the method.
    """

    store: FeatureStore
    forward: Forward
    params: Params  # with the original's trunk and text tower
    table: Table

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns some rows of all columns, like `FeatureStore.take`."""
        columns = self.store.take(rows)
        table = {name: columns[name] for name in ("features", "h_text")}
        table |= {n: np.asarray(self.table[n])[rows] for n in ("has_image", "has_text")}
        outputs = self.forward.outputs(self.params, table, np.arange(len(rows)))
        return columns | {f"original_{view}": outputs[view] for view in VIEWS}


class _State(NamedTuple):
    """The model after some requests."""

    params: Params
    trained: frozenset[str]  # modules that any request has trained


def run_requests(
    ctx: RunContext,
    problem: Problem,
    method: str,
    folder: pathlib.Path,
    stage: Stage,
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Runs a method on all requests; finished ones are restored, not repeated.

    Returns:
        The outcome of all requests together, and a record of each: `count`,
        `images`, `steps`, `seconds`, `attack_auc` (of `all` rows unlearned so far,
        those of the `first` request, and those of `this` one) and `scores` of the test
        set.
    """
    requests = split_requests(ctx.data, ctx.config.unlearn, problem.seed, problem.sets)
    state = _State(problem.params or {}, frozenset())
    outcomes, records = [], []
    for number in range(len(requests)):
        stage.report_progress(f"request {number + 1}/{len(requests)}", 0, 0)
        checkpoints = folder / f"request-{number + 1}"
        request = _request_problem(problem, requests, number, state)
        outcome, state = _handle_request(
            ctx, request, method, checkpoints, stage, state
        )
        outcomes.append(outcome)
        records.append(_build_record(ctx, problem, requests, number, outcome, state))
        if outcome.diverged:
            break
    return _merge_outcomes(outcomes, state), records


def _request_problem(
    problem: Problem, requests: list[np.ndarray], number: int, state: _State
) -> Problem:
    """Returns the problem of one request."""
    retain = np.concatenate([problem.sets.retain, *requests[number + 1 :]])
    store = problem.store
    if number and store is not None:
        updated = UpdatedStore(store, problem.forward, state.params, problem.table)
        keeps_trunk = state.trained <= set(TAIL)
        # Methods only call `take`.
        store = cast(FeatureStore, updated) if keeps_trunk else None
    return problem._replace(
        sets=problem.sets._replace(retain=np.sort(retain), unlearn=requests[number]),
        params=state.params,
        seed=problem.seed + _SEED_STRIDE * number,
        store=store,
    )


def _handle_request(
    ctx: RunContext,
    problem: Problem,
    method: str,
    folder: pathlib.Path,
    stage: Stage,
    before: _State,
) -> tuple[Outcome, _State]:
    """Runs a method on one request, or restores what it has left."""
    identity = {
        "from": checkpoint.digest(before.params),
        "fingerprint": ctx.data.fingerprint,
    }
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    saved = checkpoint.restore(folder / "params", shapes, ctx.reporter.warn)
    if saved is not None and identity.items() <= saved.metadata.items():
        facts, params = saved.metadata, saved.tree
        outcome = Outcome(
            {module: params[module] for module in facts["parts"]},
            facts["seconds"],
            saved.step,
            facts["diverged"],
        )
    else:
        steps = folder / "steps"
        outcome = ctx.loop.run(method, METHODS[method], problem, steps, stage)
        params = {**before.params, **outcome.params}
        facts = identity | {
            "parts": sorted(outcome.params),
            "seconds": outcome.seconds,
            "diverged": outcome.diverged,
        }
        checkpoint.save(folder / "params", outcome.steps, params, facts)
    params = ctx.executor.replicate(params)
    return outcome, _State(params, before.trained | set(outcome.params))


def _build_record(
    ctx: RunContext,
    problem: Problem,
    requests: list[np.ndarray],
    number: int,
    outcome: Outcome,
    state: _State,
) -> dict[str, Any]:
    """Returns the cost of a request and an evaluation of the model after it."""
    unlearned = np.sort(np.concatenate(requests[: number + 1]))
    empty = unlearned[:0]
    sets = problem.sets._replace(retain=empty, unlearn=unlearned, validation=empty)
    table = evaluation_table(problem, state.trained)
    predicted = predictions.predict_all_splits(
        ctx.forward, state.params, table, ctx.data, sets
    )
    seconds = {name: outcome.seconds[name] for name in ("start", "steps", "compile")}
    attacked = {"all": unlearned, "first": requests[0], "this": requests[number]}
    return {
        "count": len(requests[number]),
        "images": int(ctx.data.has_image[requests[number]].sum()),
        "steps": outcome.steps,
        "seconds": seconds | {"unlearn": seconds["start"] + seconds["steps"]},
        "attack_auc": {
            name: predictions.attack_auc(
                _select_unlearn_rows(predicted, ctx.data.id[rows])
            )
            for name, rows in attacked.items()
        },
        "scores": {"test": predictions.compute_scores(predicted)["test"]},
        "diverged": outcome.diverged,
    }


def _select_unlearn_rows(predicted: Predictions, ids: np.ndarray) -> Predictions:
    """Drops the rows of the unlearn set whose ids are not among these."""
    rows = (predicted.split != "unlearn") | np.isin(predicted.id, ids)
    columns = {
        name: x[rows]
        for name, x in predicted._asdict().items()
        if isinstance(x, np.ndarray)
    }
    logits = {view: x[rows] for view, x in predicted.logits.items()}
    return predicted._replace(logits=logits, **columns)


def _merge_outcomes(outcomes: list[Outcome], state: _State) -> Outcome:
    """Adds up the costs of all requests; takes all modules that any has trained."""
    diverged = outcomes[-1].diverged
    return Outcome(
        params={module: state.params[module] for module in sorted(state.trained)},
        seconds={
            name: sum(outcome.seconds[name] for outcome in outcomes)
            for name in ("start", "steps", "compile")
        },
        steps=sum(outcome.steps for outcome in outcomes),
        diverged=diverged and f"request {len(outcomes)}: {diverged}",
    )
