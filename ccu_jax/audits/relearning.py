"""Relearning: how many training steps restore what a model has unlearned.

A model that still holds information on the images relearns them faster than one that
has never seen them (Tarun et al. 2023): compare with the reference's number of steps.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ccu_jax.methods import Problem, reference, stopping
from ccu_jax.models import Params
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint
from ccu_jax.train.program import Program

MAX_STEPS = 100
NAME = "relearn"  # seeds the order of rows
_NUM_TRAININGS = 3
_TOLERANCE = 0.01  # share of the original's score that may be missing
_SPLIT = stopping.MONITORED_SPLITS[0]


class Relearned(NamedTuple):
    """Steps until the original's score was restored, of several trainings.

    Attributes:
        steps: their median; None: not restored within `max_steps`.
        fewest: the minimum, None likewise.
        greatest: the maximum, None likewise.
        most: the limit of steps.
        seconds: of all trainings.
        diverged: why one of them diverged, if any did.
    """

    steps: int | None
    fewest: int | None
    greatest: int | None
    most: int
    seconds: float
    diverged: str | None = None


def relearn(
    ctx: RunContext,
    problem: Problem,
    params: Params,
    folder: pathlib.Path,
    tolerance: float = _TOLERANCE,
) -> Relearned:
    """Trains a model on the unlearn set until its image score is the original's again.

    Args:
        ctx: the context of the run.
        problem: with the unlearn set and the original's parameters.
        params: all modules of the model.
        folder: for checkpoints of the trainings; it is removed.
        tolerance: share of the original's score that may be missing.
    """
    steps, seconds, diverged = [], 0.0, None
    for index in range(_NUM_TRAININGS):
        # Each training has its own order of rows.
        trained = problem._replace(method=NAME, seed=problem.seed + (index << 32))
        target = np.float32((1 - tolerance) * _original_score(trained))

        def method(trained: Problem, target: np.float32 = target) -> Program:
            return _make_program(trained._replace(params=params), target)

        outcome = ctx.loop.run(NAME, method, trained, folder / str(index), NullStage())
        checkpoint.remove(folder / str(index))
        is_restored = outcome.steps < MAX_STEPS and not outcome.diverged
        steps.append(outcome.steps if is_restored else MAX_STEPS)
        seconds += outcome.seconds["steps"]
        diverged = diverged or outcome.diverged
    checkpoint.remove(folder)
    summary = sorted(steps)[_NUM_TRAININGS // 2], min(steps), max(steps)
    median, fewest, greatest = (x if x < MAX_STEPS else None for x in summary)
    return Relearned(median, fewest, greatest, MAX_STEPS, seconds, diverged)


def _original_score(problem: Problem) -> float:
    """Returns the original's image score on the monitored rows of the unlearn set."""
    assert problem.params is not None
    rows = stopping.subsample(problem, problem.sets.unlearn, _SPLIT)
    logits = problem.forward.outputs(problem.params, problem.table, rows)["image"]
    if not np.isfinite(logits).all():
        return np.inf
    labels = np.asarray(problem.table["labels"])[rows]
    weights = np.ones(len(rows), np.float32)
    return float(stopping.score(logits, labels, weights, problem.multi_label))


def _make_program(problem: Problem, target: np.float32) -> Program:
    """Returns the training, which checks the score before every step."""
    unlearn, config = problem.sets.unlearn, problem.config.finetune
    epochs = MAX_STEPS * config.batch / len(unlearn)
    program = reference.train_classifier(
        problem, problem.original, dataclasses.replace(config, epochs=epochs), unlearn
    )
    scores = stopping.make_score_fn(problem, (_SPLIT, _SPLIT))

    def check(params, frozen, aux, tables):
        return aux | {"back": scores(params, tables)[0] >= aux["target"]}

    return program._replace(
        sharded_tables={_SPLIT: stopping.monitored_tables(problem)[_SPLIT]},
        aux={"target": jnp.asarray(target), "back": jnp.zeros((), bool)},
        refresh=check,
        refresh_every=1,
        stop=lambda aux: aux["back"],
    )
