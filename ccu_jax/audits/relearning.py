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
_NAME = "relearn"  # part of the random seeds
_NUM_TRAININGS = 3
_SPLIT = stopping.MONITORED_SPLITS[0]


class Relearned(NamedTuple):
    """Steps until the original's score was restored, over several trainings.

    `steps` is the median, `min_steps` and `max_steps` the range; None: not restored
    within `limit` steps. `diverged`: why a training diverged, if one did.
    """

    steps: int | None
    min_steps: int | None
    max_steps: int | None
    limit: int
    seconds: float
    diverged: str | None


def relearn(
    ctx: RunContext,
    problem: Problem,
    params: Params,
    folder: pathlib.Path,
    tolerance: float = 0.01,
) -> Relearned:
    """Trains a model on the unlearn set until its image score is the original's again.

    `folder` is for checkpoints and removed at the end; `tolerance` is the fraction of
    the original's score that may be missing.
    """
    steps, seconds, diverged = [], 0.0, None
    for index in range(_NUM_TRAININGS):
        # Each training has its own order of rows.
        seeded = problem._replace(method=_NAME, seed=problem.seed + (index << 32))
        target = np.float32((1 - tolerance) * _original_score(seeded))

        def method(problem: Problem, target: np.float32 = target) -> Program:
            return _make_program(problem._replace(params=params), target)

        outcome = ctx.loop.run(_NAME, method, seeded, folder / str(index), NullStage())
        checkpoint.remove(folder / str(index))
        is_restored = outcome.steps < MAX_STEPS and not outcome.diverged
        steps.append(outcome.steps if is_restored else MAX_STEPS)
        seconds += outcome.seconds["steps"]
        diverged = diverged or outcome.diverged
    checkpoint.remove(folder)
    summary = sorted(steps)[_NUM_TRAININGS // 2], min(steps), max(steps)
    median, low, high = (x if x < MAX_STEPS else None for x in summary)
    return Relearned(median, low, high, MAX_STEPS, seconds, diverged)


def _original_score(problem: Problem) -> float:
    """Returns the original's image score on the monitored rows of the unlearn set."""
    rows = stopping.subsample(problem, problem.sets.unlearn, _SPLIT)
    logits = problem.forward.outputs(problem.original, problem.table, rows)["image"]
    if not np.isfinite(logits).all():
        return np.inf
    labels = np.asarray(problem.table["labels"])[rows]
    weights = np.ones(len(rows), np.float32)
    return float(stopping.score(logits, labels, weights, problem.multi_label))


def _make_program(problem: Problem, target: np.float32) -> Program:
    """Returns the training, which checks the score before every step."""
    unlearn, config = problem.sets.unlearn, problem.config.finetune
    epochs = MAX_STEPS * config.batch / len(unlearn)
    config = dataclasses.replace(config, epochs=epochs)
    program = reference.train_classifier(problem, problem.original, config, unlearn)
    scores = stopping.make_score_fn(problem, (_SPLIT, _SPLIT))

    def check(params, frozen, aux, tables):
        return aux | {"is_restored": scores(params, tables)[0] >= aux["target"]}

    return program._replace(
        sharded_tables={_SPLIT: stopping.monitored_tables(problem)[_SPLIT]},
        aux={"target": jnp.asarray(target), "is_restored": jnp.zeros((), bool)},
        refresh=check,
        refresh_every=1,
        stop=lambda aux: aux["is_restored"],
    )
