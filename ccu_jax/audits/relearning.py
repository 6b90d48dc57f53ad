"""How soon a model learns again what it was made to forget.

A model that still holds the pictures somewhere is taught them again sooner than one
that has never seen them (Tarun et al. 2023): compare with the reference's steps.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ccu_jax.methods import Problem, reference, stopping
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint
from ccu_jax.train.program import Program

MOST_STEPS = 100
NAME = "relearn"
_TIMES = 3


class Relearned(NamedTuple):
    """Steps until the score was back, of some trainings with rows in another order.

    `steps` is their median, `fewest` and `greatest` are their range; None: not within
    `most` steps. `seconds` of all together. `diverged`: what went wrong in one.
    """

    steps: int | None
    fewest: int | None
    greatest: int | None
    most: int
    seconds: float
    diverged: str | None = None


def relearn(
    ctx, problem: Problem, params, folder: pathlib.Path, within: float = 0.01
) -> Relearned:
    """Train a model with the unlearn set alone until it knows its pictures again.

    Args:
        ctx: the context of the run.
        problem: with the unlearn set, and the original's parameters: what it knows of
            the pictures looked at is to be reached.
        params: all parts of the model.
        folder: for what a long training leaves in between; it is removed.
        within: which share of the original's score may be missing.
    """
    steps, seconds, diverged = [], 0.0, None
    for time in range(_TIMES):
        given = problem._replace(method=NAME, seed=problem.seed + (time << 32))
        target = (1 - within) * _known(given)

        def method(given, target=target):
            return program(given._replace(params=params), np.float32(target))

        outcome = ctx.loop.run(NAME, method, given, folder / str(time), NullStage())
        checkpoint.remove(folder / str(time))
        back = outcome.steps < MOST_STEPS and not outcome.diverged
        steps.append(outcome.steps if back else MOST_STEPS)
        seconds += outcome.seconds["steps"]
        diverged = diverged or outcome.diverged
    checkpoint.remove(folder)
    told = (sorted(steps)[_TIMES // 2], min(steps), max(steps))
    told = (number if number < MOST_STEPS else None for number in told)
    return Relearned(*told, MOST_STEPS, seconds, diverged)


def _known(problem) -> float:
    """The image view's score, of the original, of the pictures looked at."""
    rows = stopping.subsample(
        problem, problem.sets.unlearn, stopping.MONITORED_SPLITS[0]
    )
    said = problem.forward.outputs(problem.params, problem.table, rows)["image"]
    labels = np.asarray(problem.table["labels"])[rows]
    ones = np.ones(len(rows), np.float32)
    found = float(stopping.score(said, labels, ones, problem.multi_label))
    return found if np.isfinite(said).all() else np.inf


def program(problem: Problem, target) -> Program:
    """The training, which looks at the unlearn set before every step."""
    unlearn = problem.sets.unlearn
    given = problem.config.finetune
    epochs = MOST_STEPS * given.batch / len(unlearn)
    section = dataclasses.replace(given, epochs=epochs)
    fitted = reference.train_classifier(problem, problem.params, section, unlearn)
    name = stopping.MONITORED_SPLITS[0]
    parts = {name: stopping.monitored_tables(problem)[name]}
    look_at = stopping.make_score_fn(problem, (name, name))

    def look(params, frozen, aux, parts):
        return aux | {"back": look_at(params, parts)[0] >= aux["target"]}

    return fitted._replace(
        sharded_tables=parts,
        aux={"target": jnp.asarray(target), "back": jnp.zeros((), bool)},
        refresh=look,
        refresh_every=1,
        stop=lambda aux: aux["back"],
    )
