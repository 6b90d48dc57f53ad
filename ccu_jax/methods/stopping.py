"""Early stopping: end when unlearn images are recognized no better than held-out ones.

Methods that undo what was learned can stop too early or too late. The stop rule of
Contrastive Unlearning (Lee et al. 2024) checks after every few steps; the rewinding of
SCRUB (Kurmanji et al. 2023) picks the best checkpoint at the end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import gather_replicated, read_rows
from ccu_jax.methods.cached_features import pad_rows, padded_size
from ccu_jax.methods.problem import Problem
from ccu_jax.models import Params
from ccu_jax.train.program import Program

# The score of more rows would hardly be more precise.
MAX_ROWS = 400
MONITORED_SPLITS = ("seen_unlearn", "seen_held")

Array = jax.Array | np.ndarray
ScoreFn = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


def score(logits: Array, labels: Array, weight: Array, multi_label: bool) -> jax.Array:
    """Returns the accuracy, or the micro F1, of the rows with nonzero weight."""
    weight = weight[:, None]
    if not multi_label:
        predicted = jax.nn.one_hot(logits.argmax(1), labels.shape[1])
        return (predicted * labels * weight).sum() / jnp.maximum(weight.sum(), 1)
    predicted = (logits > 0) * weight
    labels = labels * weight
    return 2 * (predicted * labels).sum() / jnp.maximum((predicted + labels).sum(), 1)


def make_score_fn(
    problem: Problem, names: tuple[str, str] = MONITORED_SPLITS
) -> ScoreFn:
    """Returns a function that scores the image view on unlearn and held-out rows.

    If a whole class is unlearned (Lee et al. 2024), held-out rows of other classes are
    no measure for it. The chance accuracy then replaces their score, unless rows have
    several labels. `names` are the sharded tables with unlearn and held-out rows. The
    function is per-device and returns both scores, in that order.
    """
    is_class_rule = problem.config.unlearn.rule.startswith("class:")

    def score_rows(params, rows):
        logits = problem.model.apply(params, rows).image
        logits, labels, weight = gather_replicated(
            (logits, rows["labels"], rows["has_image"])
        )
        return score(logits, labels, weight, problem.multi_label)

    def scores(params, sharded_tables):
        unlearn, heldout = (sharded_tables[name] for name in names)
        if is_class_rule and not problem.multi_label:
            chance = 1 / jnp.float32(heldout["labels"].shape[1])
            return score_rows(params, unlearn), chance
        return score_rows(params, unlearn), score_rows(params, heldout)

    return scores


def with_stop_rule(
    problem: Problem, program: Program, names: tuple[str, str] = MONITORED_SPLITS
) -> Program:
    """Adds the stop rule to a program.

    Every `check_every` steps it compares the image view's score on the unlearn set with
    the score on held-out (validation) rows, and stops as soon as it is not higher.
    `names` are the program's sharded tables with these rows, which it gets if it has no
    sharded tables; `frozen["modules"]`, if any, are modules that it does not train.
    """
    scores = make_score_fn(problem, names)

    def check(params, frozen, aux, sharded_tables):
        params = {**frozen.get("modules", {}), **params}
        unlearn, heldout = scores(params, sharded_tables)
        return {"stopped": unlearn <= heldout}

    return program._replace(
        sharded_tables=program.sharded_tables or monitored_tables(problem),
        aux={"stopped": jnp.zeros((), bool)},
        refresh=check,
        refresh_every=problem.method_config.check_every,
        stop=lambda aux: aux["stopped"],
    )


def subsample(problem: Problem, rows: np.ndarray, purpose: str) -> np.ndarray:
    """Draws at most `MAX_ROWS` of the rows with an image; `purpose` seeds the draw."""
    rows = rows[np.asarray(problem.table["has_image"])[rows]]
    if len(rows) > MAX_ROWS:
        return problem.sample_rows(rows, MAX_ROWS, purpose)
    return rows


def monitored_tables(problem: Problem) -> dict[str, dict[str, jax.Array]]:
    """Returns sharded tables of unlearn and held-out rows, by `MONITORED_SPLITS`."""
    sets, tables = problem.sets, {}
    for name, split in zip(
        MONITORED_SPLITS, (sets.unlearn, sets.validation), strict=True
    ):
        rows = subsample(problem, split, name)
        size = padded_size(len(rows), problem.executor.num_devices)
        tables[name] = problem.executor.shard_tree(
            {
                column: pad_rows(read_rows(x, rows), size)
                for column, x in problem.table.items()
            }
        )
    return tables


def with_rewind(problem: Problem, program: Program, num_checkpoints: int) -> Program:
    """Makes a program return the checkpoint that looks most like a retrained model.

    Checkpoints are kept in memory at equal distances. The result is the one whose image
    score on the unlearn set is nearest to the final score on held-out rows.
    """
    scores = make_score_fn(problem)
    every = -(-program.steps // num_checkpoints)
    # Refreshes run before a step, so the last one needs further steps. Their learning
    # rate is 0.
    extra_steps = every * num_checkpoints + 1 - program.steps
    assert program.plan is not None
    plan = {
        name: np.pad(rows, ((0, extra_steps), (0, 0)), mode="edge")
        for name, rows in program.plan.items()
    }
    slots = num_checkpoints + 1
    empty = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape)), program.params)

    def save_checkpoint(params, frozen, aux, sharded_tables):
        unlearn, heldout = scores(params, sharded_tables)
        slot = aux["count"]
        return {
            "checkpoints": jax.tree.map(
                lambda x, y: x.at[slot].set(y), aux["checkpoints"], params
            ),
            "unlearn": aux["unlearn"].at[slot].set(unlearn),
            "heldout": heldout,
            "count": slot + 1,
        }

    return program._replace(
        plan=plan,
        sharded_tables=monitored_tables(problem),
        aux={
            "checkpoints": empty,
            "unlearn": jnp.zeros(slots),
            "heldout": jnp.zeros(()),
            "count": jnp.int32(0),
        },
        refresh=save_checkpoint,
        refresh_every=every,
        result=_select_checkpoint,
    )


def _select_checkpoint(params: Params, aux: dict[str, Any]) -> Params:
    gap = np.abs(np.asarray(aux["unlearn"]) - np.asarray(aux["heldout"]))
    # Slot 0 is the original. A run that was stopped early fills fewer slots.
    count = int(aux["count"])
    best = 1 + int(gap[1:count].argmin()) if count > 1 else 0
    return jax.tree.map(lambda x: x[best], aux["checkpoints"])
