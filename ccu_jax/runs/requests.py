"""Streaming: requests to forget that come one after another.

The unlearn set is cut into requests in the order of forgetting. Each is handled on what
the one before has left: its rows are the unlearn set, rows of later requests are still
retained, those of earlier ones are in neither. After each the model is evaluated on all
that is gone by then.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL, VIEWS
from ccu_jax.runs.context import RunContext
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Outcome
from ccu_jax.unlearn_sets import splits as unlearn_set

# Each request has random numbers of its own, and the first those of a lone one.
_SEEDS = 1_000_003


def split_requests(
    ctx: RunContext, seed: int, sets: unlearn_set.Sets
) -> list[np.ndarray]:
    """The rows of each request, about as many pictures in each; no group is split.

    Raises:
        UserError: there are fewer groups than requests.
    """
    config = ctx.config.unlearn
    groups = unlearn_set.groups_in_order(ctx.data, sets, seed, config.duplicates)
    pictures = np.array([ctx.data.has_image[rows].sum() for rows in groups])
    # Each needs a picture to forget; groups without one go with the one before them.
    shown = np.flatnonzero(pictures)
    if len(shown) < config.num_requests:
        raise UserError(
            f"unlearn.num_requests={config.num_requests}: the unlearn set of seed "
            f"{seed} has {len(shown)} groups with pictures; give at most so many"
        )
    ends = np.cumsum(pictures[shown])
    starts = [0]
    for number in range(1, config.num_requests):
        aim = ends[-1] * number / config.num_requests
        near = 1 + int(np.abs(ends - aim).argmin())
        most = len(shown) - (config.num_requests - number)
        starts.append(min(max(near, starts[-1] + 1), most))
    places = [0, *shown[starts[1:]], len(groups)]
    return [
        np.sort(np.concatenate(groups[first:last]))
        for first, last in zip(places, places[1:], strict=False)
    ]


class _State(NamedTuple):
    """How far the requests are: the whole model, and which parts have been trained."""

    params: Any
    trained: frozenset[str]


class UpdatedStore(NamedTuple):
    """A store of features whose model has gone on: its heads say what they say now.

    Else a method that keeps what the original says of retained rows would bring back
    what earlier requests have made the model forget. It is computed for the rows that
    are asked for, on the method's clock.
    """

    stored: features.FeatureStore
    forward: Forward
    params: Any
    table: dict[str, Any]

    def take(self, rows) -> dict[str, np.ndarray]:
        """The columns' rows of these numbers, as `Store.take`."""
        columns = self.stored.take(rows)
        given = {name: columns[name] for name in ("features", "h_text")}
        given |= {n: np.asarray(self.table[n])[rows] for n in ("has_image", "has_text")}
        said = self.forward.outputs(self.params, given, np.arange(len(rows)))
        return columns | {f"original_{view}": said[view] for view in VIEWS}


def run_requests(
    ctx, problem, method: str, folder: pathlib.Path, stage
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Handle all requests with a method; those that are done are not done again.

    Args:
        ctx: the context of the run.
        problem: with all requests together as the unlearn set, and the original.
        method: its name.
        folder: of what a run that was killed goes on from.
        stage: told of the progress.

    Returns:
        The outcome of all together, and of each request `count`, `pictures`, `steps`,
        `seconds`, `attack_auc` (of `all` rows that are gone by then, of the `first`
        request's and of `this` one's) and `scores` of the test set.
    """
    parts = split_requests(ctx, problem.seed, problem.sets)
    state, outcomes, told = _State(problem.params, frozenset()), [], []
    for number in range(len(parts)):
        stage.report_progress(f"request {number + 1}/{len(parts)}", 0, 0)
        at = folder / f"request-{number + 1}"
        given = _request_problem(problem, parts, number, state)
        outcome, state = _handle_request(ctx, given, method, at, stage, state)
        outcomes.append(outcome)
        told.append(_build_record(ctx, problem, parts, number, outcome, state))
        if outcome.diverged:
            break
    return _merge_outcomes(outcomes, state), told


def _request_problem(problem, parts, number, state):
    """What a method is given for one request."""
    later = [problem.sets.retain, *parts[number + 1 :]]
    sets = problem.sets._replace(
        retain=np.sort(np.concatenate(later)), unlearn=parts[number]
    )
    store = problem.store
    if number and store is not None:
        ongoing = UpdatedStore(store, problem.forward, state.params, problem.table)
        store = ongoing if _trunk_is_original(state) else None
    return problem._replace(
        sets=sets,
        params=state.params,
        seed=problem.seed + _SEEDS * number,
        store=store,
    )


def _trunk_is_original(state) -> bool:
    """Whether trunk and text branch, and so what is stored, are the original's."""
    return state.trained <= set(TAIL)


def _handle_request(
    ctx: RunContext, problem, method, folder, stage, before
) -> tuple[Outcome, _State]:
    """Run a method for one request, or take what it has left when it ran before."""
    known = {
        "from": checkpoint.digest(before.params),
        "fingerprint": ctx.data.fingerprint,
    }
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    saved = checkpoint.restore(folder / "params", shapes, ctx.reporter.warn)
    if saved is not None and known.items() <= saved.facts.items():
        facts, params = saved.facts, saved.tree
        outcome = Outcome(
            {part: params[part] for part in facts["parts"]},
            facts["seconds"],
            saved.step,
            facts["diverged"],
        )
    else:
        steps = folder / "steps"
        outcome = ctx.loop.run(method, METHODS[method], problem, steps, stage)
        params = {**before.params, **outcome.params}
        facts = known | {
            "parts": sorted(outcome.params),
            "seconds": outcome.seconds,
            "diverged": outcome.diverged,
        }
        checkpoint.save(folder / "params", outcome.steps, params, facts)
    params = ctx.executor.replicate(params)
    return outcome, _State(params, before.trained | set(outcome.params))


def _build_record(
    ctx: RunContext, problem, parts, number, outcome, state
) -> dict[str, Any]:
    """What a request cost, and what the model is like after it."""
    gone = np.sort(np.concatenate(parts[: number + 1]))
    none = gone[:0]
    sets = problem.sets._replace(retain=none, unlearn=gone, validation=none)
    table = ctx.table
    if problem.store is not None and _trunk_is_original(state):
        table = problem.store.as_table(table)
    found = predictions.predict_all_splits(
        ctx.forward, state.params, table, ctx.data, sets
    )
    seconds = {name: outcome.seconds[name] for name in ("start", "steps", "compile")}
    asked = {"all": gone, "first": parts[0], "this": parts[number]}
    return {
        "count": len(parts[number]),
        "pictures": int(ctx.data.has_image[parts[number]].sum()),
        "steps": outcome.steps,
        "seconds": seconds | {"unlearn": seconds["start"] + seconds["steps"]},
        "attack_auc": {
            name: predictions.attack_auc(_select_unlearn_rows(found, ctx.data.id[rows]))
            for name, rows in asked.items()
        },
        "scores": {"test": predictions.compute_scores(found)["test"]},
        "diverged": outcome.diverged,
    }


def _select_unlearn_rows(results, ids) -> predictions.Predictions:
    """The results with no other forgotten rows than these."""
    kept = (results.split != "unlearn") | np.isin(results.id, ids)
    columns = {
        name: x[kept]
        for name, x in results._asdict().items()
        if isinstance(x, np.ndarray)
    }
    logits = {view: x[kept] for view, x in results.logits.items()}
    return results._replace(logits=logits, **columns)


def _merge_outcomes(outcomes, state) -> Outcome:
    """One outcome of all requests: their sums, and the parts that any has trained."""
    last = outcomes[-1]
    number = len(outcomes)
    return Outcome(
        params={part: state.params[part] for part in sorted(state.trained)},
        seconds={
            name: sum(outcome.seconds[name] for outcome in outcomes)
            for name in ("start", "steps", "compile")
        },
        steps=sum(outcome.steps for outcome in outcomes),
        diverged=last.diverged and f"request {number}: {last.diverged}",
    )
