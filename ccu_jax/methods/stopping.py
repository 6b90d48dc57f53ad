"""Early stopping once unlearn images are recognized no better than held-out images.

Methods that undo learning can stop too early or too late. The stop rule of Contrastive
Unlearning (Lee et al. 2024) checks every few steps; the rewinding of SCRUB (Kurmanji et
al. 2023) selects the best checkpoint at the end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import gather_replicated, read_rows
from ccu_jax.methods.cached_features import pad_and_shard
from ccu_jax.methods.problem import Problem
from ccu_jax.models import Params
from ccu_jax.train.program import Program

# Maximum rows per split; more rows would hardly make the score more precise.
MAX_ROWS = 400
MONITORED_SPLITS = ("seen_unlearn", "seen_held")

Array = jax.Array | np.ndarray
ScoreFn = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


def compute_score(
    logits: Array, labels: Array, weight: Array, multi_label: bool
) -> jax.Array:
    """Returns the weighted accuracy, or the micro F1 if rows have several labels."""
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
    """Returns a per-device function that scores images of unlearn and held-out rows.

    If a whole class is unlearned (Lee et al. 2024), held-out rows of other classes are
    not comparable. The chance accuracy then replaces their score, unless rows have
    several labels. `names` are those of the unlearn and held-out tables.
    """
    is_class_rule = problem.config.unlearn.rule.startswith("class:")

    def score_rows(params, rows):
        logits = problem.model.apply(params, rows).image
        inputs = gather_replicated((logits, rows["labels"], rows["has_image"]))
        return compute_score(*inputs, multi_label=problem.multi_label)

    def scores(params, sharded_tables):
        unlearn, heldout = (sharded_tables[name] for name in names)
        if is_class_rule and not problem.multi_label:
            chance = 1 / jnp.float32(heldout["labels"].shape[1])
            return score_rows(params, unlearn), chance
        return score_rows(params, unlearn), score_rows(params, heldout)

    return scores


def add_stop_rule(problem: Problem, program: Program) -> Program:
    """Adds the stop rule to a program.

    Every `check_every` steps it compares the image score on the unlearn set with that
    on held-out (validation) rows, and stops once it is not higher. The rows come from
    the program's sharded tables, if any, else from `make_monitored_tables`.
    `frozen["modules"]` are the parameters of the modules that are not trained.
    """
    names = ("unlearn", "held") if program.sharded_tables else MONITORED_SPLITS
    scores = make_score_fn(problem, names)

    def check(params, frozen, aux, sharded_tables):
        params = {**frozen["modules"], **params}
        unlearn, heldout = scores(params, sharded_tables)
        return {"stopped": unlearn <= heldout}

    return program._replace(
        sharded_tables=program.sharded_tables or make_monitored_tables(problem),
        aux={"stopped": jnp.zeros((), bool)},
        refresh=check,
        refresh_every=problem.method_config.check_every,
        stop=lambda aux: aux["stopped"],
    )


def subsample(problem: Problem, rows: np.ndarray, purpose: str) -> np.ndarray:
    """Draws at most `MAX_ROWS` of the rows with an image; `purpose` seeds the draw."""
    rows = rows[np.asarray(problem.table["has_image"])[rows]]
    return problem.sample_rows(rows, MAX_ROWS, purpose)


def make_monitored_tables(problem: Problem) -> dict[str, dict[str, jax.Array]]:
    """Returns sharded tables of unlearn and validation rows by `MONITORED_SPLITS`."""
    tables, splits = {}, (problem.sets.unlearn, problem.sets.validation)
    for name, split in zip(MONITORED_SPLITS, splits, strict=True):
        rows = subsample(problem, split, name)
        table = {column: read_rows(x, rows) for column, x in problem.table.items()}
        tables[name] = pad_and_shard(problem.executor, table)
    return tables


def add_rewind(problem: Problem, program: Program, num_checkpoints: int) -> Program:
    """Adds the rewinding of SCRUB+R: the program returns its best checkpoint.

    Checkpoints are stored in device memory at regular intervals. The best one has the
    image score on the unlearn set closest to the final score on held-out rows.
    """
    scores = make_score_fn(problem)
    every = -(-program.steps // num_checkpoints)
    # Refreshes run before a step, so the last needs extra steps, of learning rate 0.
    extra_steps = every * num_checkpoints + 1 - program.steps
    plan = {
        name: np.pad(rows, ((0, extra_steps), (0, 0)), mode="edge")
        for name, rows in program.plan.items()
    }
    slots = num_checkpoints + 1
    arrays = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape)), program.params)

    def save_checkpoint(params, frozen, aux, sharded_tables):
        unlearn, heldout = scores(params, sharded_tables)
        slot, values = aux["count"], {"checkpoints": params, "unlearn": unlearn}
        arrays = {name: aux[name] for name in values}
        arrays = jax.tree.map(lambda x, value: x.at[slot].set(value), arrays, values)
        return {**arrays, "heldout": heldout, "count": slot + 1}

    return program._replace(
        plan=plan,
        sharded_tables=make_monitored_tables(problem),
        aux={
            "checkpoints": arrays,
            "unlearn": jnp.zeros(slots),
            "heldout": jnp.zeros(()),
            "count": jnp.int32(0),
        },
        refresh=save_checkpoint,
        refresh_every=every,
        result=_select_checkpoint,
    )


def _select_checkpoint(params: Params, aux: dict[str, Any]) -> Params:
    """Returns the parameters of the best checkpoint; see `add_rewind`."""
    gap = np.abs(np.asarray(aux["unlearn"]) - np.asarray(aux["heldout"]))
    # Slot 0 is the original. A run that was stopped early fills fewer slots.
    count = int(aux["count"])
    best = 1 + int(gap[1:count].argmin()) if count > 1 else 0
    return jax.tree.map(lambda x: x[best], aux["checkpoints"])
