"""How soon a model learns again what it was made to forget.

A model that still holds the pictures somewhere is taught them again sooner than one
that has never seen them (Tarun et al. 2023): compare with the reference's steps.
"""

import dataclasses
import math
import pathlib
import shutil
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ccu_jax.methods import Problem, reference, stopping
from ccu_jax.progress import Quiet
from ccu_jax.step import Program

MOST_STEPS = 100
NAME = "relearn"


class Relearned(NamedTuple):
    """`steps` until the score was back; None: not within `most` steps."""

    steps: int | None
    most: int
    seconds: float


def relearn(
    bench, problem: Problem, params, target: float, folder: pathlib.Path
) -> Relearned:
    """Train a model with the unlearn set alone until it knows its pictures again.

    Args:
        bench: the `stages.Bench`.
        problem: with the unlearn set.
        params: all parts of the model.
        target: the image view's score of the unlearn set to be reached, 0..1: of the
            original, less 1 %.
        folder: for what a long training leaves in between; it is removed.
    """
    problem = problem._replace(params=params)

    def method(given):
        return program(given, np.float32(target))

    outcome = bench.loop.run(NAME, method, problem, folder, Quiet())
    shutil.rmtree(folder, ignore_errors=True)
    back = None if outcome.steps >= MOST_STEPS or outcome.diverged else outcome.steps
    return Relearned(back, MOST_STEPS, outcome.seconds["steps"])


def program(problem: Problem, target) -> Program:
    """The training, which looks at the unlearn set before every step."""
    unlearn = problem.sets.unlearn
    given = problem.config.finetune
    epochs = MOST_STEPS * given.batch / len(unlearn)
    section = dataclasses.replace(given, epochs=epochs)
    fitted = reference.fit(problem, problem.params, section, unlearn)
    name = stopping.LOOKS[0]
    parts = {name: stopping.pictures(problem)[name]}
    look_at = stopping.image_scores(problem, (name, name))

    def look(params, frozen, aux, parts):
        return aux | {"back": look_at(params, parts)[0] >= aux["target"]}

    return fitted._replace(
        parts=parts,
        aux={"target": jnp.asarray(target), "back": jnp.zeros((), bool)},
        refresh=look,
        refresh_every=1,
        stop=lambda aux: aux["back"],
    )


def target_of(score: float) -> float:
    """The score that counts as back: within 1 % of the original's."""
    return 0.99 * score if math.isfinite(score) else math.inf
