"""A method under other settings: what `tune` and `ablate` are made of.

A variant is run from the same original as all others, judged, and kept as one small
file, so that a run that was cut off goes on where it was.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config.schema import Config, check_batches
from ccu_jax.distributed.hosts import barrier, is_primary, wait_until_visible
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS, Problem
from ccu_jax.models import TAIL
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage

Row = dict[str, Any]


class Variant(NamedTuple):
    """A method, and which of its settings are others than the configuration's."""

    method: str
    settings: dict[str, Any]


def check(config: Config, names: list[str], of: str) -> None:
    """Refuses what cannot be run, before anything is.

    Args:
        config: of the run.
        names: the methods whose variants are to run.
        of: what `names` are chosen from, in words.

    Raises:
        UserError: there is no such method, or a batch that the devices cannot share.
    """
    if not names:
        raise UserError(f"methods: none of them is {of}; give others with --methods")
    if config.unlearn.num_requests > 1:
        raise UserError(
            f"unlearn.num_requests={config.unlearn.num_requests}: settings are "
            "looked at for one request; leave it out"
        )
    check_batches(config, names, jax.device_count())


def check_there(ctx: RunContext) -> None:
    """Refuses a folder whose pictures were purged: nothing can be run on it.

    Raises:
        UserError: they were.
    """
    if ctx.data.purged:
        raise UserError(
            f"the pictures to forget were purged from {ctx.workdir}: give another "
            "--workdir"
        )


def place(
    workdir: pathlib.Path, seed: int, variant: Variant, tested: bool = True
) -> pathlib.Path:
    """The file of what came of a variant, judged with test rows or without."""
    text = json.dumps(variant.settings, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return (
        workdir
        / ("tested" if tested else "variants")
        / f"{variant.method}-{seed}-{name}.json"
    )


def run(ctx: RunContext, problem: Problem, variant: Variant) -> Row:
    """What comes of a variant: from its file, or run now.

    Args:
        ctx: the context of the run.
        problem: with the original and its features. Sets that are empty are not judged.
        variant: what to run.

    Raises:
        UserError: its file is damaged.
    """
    tested = bool(len(problem.sets.test))
    path = place(ctx.workdir, problem.seed, variant, tested)
    if wait_until_visible(path):
        return _read(path, ctx.data.fingerprint)
    method = variant.method
    section = dataclasses.replace(getattr(problem.config, method), **variant.settings)
    config = dataclasses.replace(problem.config, **{method: section})
    problem = problem._replace(config=config)
    steps = path.with_suffix("")
    outcome = ctx.loop.run(method, METHODS[method], problem, steps, NullStage())
    found = judge(ctx, problem, outcome.params)
    row: Row = {
        "method": method,
        "settings": variant.settings,
        "seed": problem.seed,
        "metric": ctx.data.metric,
        "steps": outcome.steps,
        "seconds": outcome.seconds
        | {"unlearn": outcome.seconds["start"] + outcome.seconds["steps"]},
        "diverged": outcome.diverged or found.pop("collapsed"),
        "fingerprint": ctx.data.fingerprint,
        "commit": rows.source_commit(),
        **found,
    }
    if is_primary():
        rows.write_result(path, row)
        shutil.rmtree(steps, ignore_errors=True)
    barrier(path.name)
    return row


def judge(ctx: RunContext, problem: Problem, params) -> Row:
    """Scores and attack of a model that differs from the original in some parts.

    And `collapsed`, what is wrong with one that has fallen apart.
    """
    table = ctx.table
    if not set(params) - set(TAIL):
        table = problem.store.as_table(ctx.table)
    params = {**problem.params, **params}
    found = predictions.predict_all_splits(
        ctx.forward, params, table, ctx.data, problem.sets
    )
    before = ctx.workdir / "outputs" / f"original-{problem.seed}.npz"
    collapsed = None
    if before.exists() and len(problem.sets.test):
        collapsed = predictions.describe_collapse(
            found, predictions.load_predictions(before)
        )
    return {
        "scores": predictions.compute_scores(found),
        "attack_auc": predictions.attack_auc(found),
        "collapsed": collapsed,
    }


def without_test(problem: Problem) -> Problem:
    """The problem for choosing between settings: no test row is looked at."""
    nothing = np.zeros(0, np.int64)
    return problem._replace(sets=problem.sets._replace(test=nothing))


def _read(path, fingerprint) -> Row:
    row = rows.load_result(path)
    if row["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} belongs to other data: give another --workdir, or remove the "
            "folder to start anew"
        )
    return row
