"""When to stop: once pictures of the unlearn set are recognised like held-out ones.

Methods that push away from what was learned have a narrow window between too little and
too much. The stop rule of Contrastive Unlearning (Lee et al. 2024) looks for it while
they run, the rewinding of SCRUB (Kurmanji et al. 2023) in hindsight.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import gather_replicated, read_rows
from ccu_jax.methods.cached_features import pad_rows, padded_size
from ccu_jax.methods.problem import Problem
from ccu_jax.train.program import Program

# More rows of each kind are not looked at: the score of so many is sharp enough.
MAX_ROWS = 400
MONITORED_SPLITS = ("seen_unlearn", "seen_held")


def score(logits, labels, weight, multi_label):
    """Accuracy, or micro F1, of the rows that have a weight."""
    weight = weight[:, None]
    if not multi_label:
        best = jax.nn.one_hot(logits.argmax(1), labels.shape[1])
        return (best * labels * weight).sum() / jnp.maximum(weight.sum(), 1)
    guess = (logits > 0) * weight
    labels = labels * weight
    return 2 * (guess * labels).sum() / jnp.maximum((guess + labels).sum(), 1)


def make_score_fn(problem: Problem, names=MONITORED_SPLITS) -> Callable:
    """What the stop rules compare: `fn(params, parts) -> (unlearn, held)`.

    The image view's score of unlearn rows, and of held-out rows. Where a whole class is
    to be forgotten (Lee et al. 2024) that of guessing takes the latter's place, but for
    several labels.
    """

    whole_class = problem.config.unlearn.rule.startswith("class:")

    def of(params, rows):
        out = problem.model.apply(params, rows)
        seen = gather_replicated((out.image, rows["labels"], rows["has_image"]))
        return score(*seen, problem.multi_label)

    def scores(params, parts):
        unlearn, held = (parts[name] for name in names)
        if whole_class and not problem.multi_label:
            # Held-out rows are of all classes; of one that is gone, a guess is left.
            return of(params, unlearn), 1 / jnp.float32(held["labels"].shape[1])
        return of(params, unlearn), of(params, held)

    return scores


def with_stop_rule(
    problem: Problem, program: Program, names=MONITORED_SPLITS
) -> Program:
    """The program with the stop rule: the image view's score of the unlearn set.

    It ends as soon as that is not above the score of held-out (validation) rows, looked
    at every `check_every` steps.

    Args:
        problem: what the method was given.
        program: with `frozen["parts"]`, what it does not train, if there is any.
        names: of its parts with unlearn rows and with held-out rows.
    """
    scores = make_score_fn(problem, names)

    def look(params, frozen, aux, parts):
        params = {**frozen.get("parts", {}), **params}
        unlearn, held = scores(params, parts)
        return {"stopped": unlearn <= held}

    return program._replace(
        sharded_tables=program.sharded_tables or monitored_tables(problem),
        aux={"stopped": jnp.zeros((), bool)},
        refresh=look,
        refresh_every=problem.method_config.check_every,
        stop=lambda aux: aux["stopped"],
    )


def subsample(problem: Problem, rows, name: str) -> np.ndarray:
    """Those of the rows that are looked at: with a picture, and not too many."""
    rows = rows[np.asarray(problem.table["has_image"])[rows]]
    return problem.sample_rows(rows, MAX_ROWS, name) if len(rows) > MAX_ROWS else rows


def monitored_tables(problem: Problem) -> dict[str, dict[str, jax.Array]]:
    """Pictures and labels of unlearn and held-out rows, cut over the devices."""
    table, parts = problem.table, {}
    for name, rows in zip(
        MONITORED_SPLITS, (problem.sets.unlearn, problem.sets.validation), strict=True
    ):
        rows = subsample(problem, rows, name)
        size = padded_size(len(rows), problem.executor.num_devices)
        columns = {column: read_rows(x, rows) for column, x in table.items()}
        parts[name] = problem.executor.shard_tree(
            {column: pad_rows(x, size) for column, x in columns.items()}
        )
    return parts


def with_rewind(problem: Problem, program: Program, num_checkpoints: int) -> Program:
    """The program, which ends with the state that looks most like a retrained one.

    States are kept at `looks` even distances. In the end that is taken whose image
    score on the unlearn set is nearest to the score of held-out rows at the last.
    Steps behind the last, with a rate of zero, make room for the last look.
    """
    scores = make_score_fn(problem)
    every = -(-program.steps // num_checkpoints)
    behind = every * num_checkpoints + 1 - program.steps
    plan = {
        name: np.pad(rows, ((0, behind), (0, 0)), mode="edge")
        for name, rows in program.plan.items()
    }
    slots = num_checkpoints + 1
    kept = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape)), program.params)

    def look(params, frozen, aux, parts):
        unlearn, held = scores(params, parts)
        place = aux["count"]
        kept = jax.tree.map(lambda x, y: x.at[place].set(y), aux["kept"], params)
        return {
            "kept": kept,
            "unlearn": aux["unlearn"].at[place].set(unlearn),
            "held": held,
            "count": place + 1,
        }

    def result(params, aux):
        apart = np.abs(np.asarray(aux["unlearn"]) - np.asarray(aux["held"]))
        # The first was the original. One that was cut off has no say.
        count = int(aux["count"])
        best = 1 + int(apart[1:count].argmin()) if count > 1 else 0
        return jax.tree.map(lambda x: x[best], aux["kept"])

    return program._replace(
        plan=plan,
        sharded_tables=monitored_tables(problem),
        aux={
            "kept": kept,
            "unlearn": jnp.zeros(slots),
            "held": jnp.zeros(()),
            "count": jnp.int32(0),
        },
        refresh=look,
        refresh_every=every,
        result=result,
    )
