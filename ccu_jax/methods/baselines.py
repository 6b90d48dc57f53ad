"""Unlearning methods from the literature that train every part by the task's loss.

What is to be forgotten are pictures: where a method works against what was learned of
the unlearn set, it does so in the views that see the picture (`VISUAL`). What the text
alone says is left out of it, and kept by the retain set's loss as well as that can.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.augment import augment
from ccu_jax.methods import curvature, reference
from ccu_jax.methods.cache import together
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import branch, classification, fit
from ccu_jax.methods.section import Section
from ccu_jax.methods.stopping import stopping
from ccu_jax.models import VISUAL
from ccu_jax.step import Program, flatten


def whole(problem: Problem, loss, plan, *, optimiser=None, frozen=(), numbers=()):
    """A program that trains every part of the original.

    Args:
        problem: what the method was given.
        loss: of `Program`; its `frozen["c"]` is the method's section.
        plan: of `Program`.
        optimiser: of `Program`; that of training by default.
        frozen: more of it by name, as are `numbers`.
    """
    section, train = problem.section, problem.config.train
    steps = len(next(iter(plan.values())))
    program = Program(
        params=problem.params,
        frozen={"c": Section.of(section), **dict(frozen)},
        loss=loss,
        optimiser=optimiser or reference.optimiser(train),
        numbers=reference.rates(section.learning_rate, steps, train) | dict(numbers),
        group=branch,
        table=problem.table,
        plan=plan,
    )
    stops = getattr(section, "stop", False)
    return stopping(problem, program) if stops else program


def both(problem: Problem, epochs: float, of: str = "retain"):
    """Rows of both sets for so many passes over one of them."""
    section, sets = problem.section, problem.sets
    batch = {"retain": section.batch, "unlearn": section.unlearn_batch}
    steps = problem.steps(epochs, batch[of], getattr(sets, of))
    return {
        name: problem.batches(getattr(sets, name), size, steps, name)
        for name, size in batch.items()
    }


def said(problem: Problem, params, batch):
    """Outputs and rows of both sets, in one pass.

    Retain rows are changed at random and have dropout, as in training; those of the
    unlearn set are taken as they are.
    """
    retain = batch["retain"]
    retain = augment(retain, retain["key"], problem.config.train)
    unlearn = plain(batch["unlearn"])
    every, cut = together({"retain": retain, "unlearn": unlearn}, drop="retain")
    model = problem.model
    out = cut(model.apply(params, every, keys=every["key"], drop=every["drop"]))
    return out["retain"], retain, out["unlearn"], unlearn


def plain(rows):
    """Rows with pictures as floats, otherwise as they are."""
    return {**rows, "image": rows["image"] / 255.0}


def finetune(problem: Problem) -> Program:
    """Train on, with the retain set only."""
    return fit(problem, problem.params, problem.section, problem.sets.retain)


def l1_sparse(problem: Problem) -> Program:
    """Train on with the retain set, weights pulled to zero (Jia et al. 2023).

    `CE(retain) + sparsity * (1 - step / steps) * |params|_1`.
    """
    section = problem.section
    retain = problem.sets.retain
    steps = problem.steps(section.epochs, section.batch, retain)
    task = reference.task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        size = sum(jnp.abs(x).sum() for x in jax.tree.leaves(params))
        left = jnp.maximum(1 - step / frozen["steps"], 0)
        total = task(params, batch["rows"])
        if frozen["c"].uses("sparsity"):
            total += frozen["c"].sparsity * left * size
        return total, {}

    plan = {"rows": problem.batches(retain, section.batch, steps, "rows")}
    return whole(problem, loss, plan, frozen={"steps": np.float32(steps)})


def guessing(problem: Problem) -> float:
    """The loss of a model that knows nothing."""
    num_classes = problem.table["labels"].shape[1]
    if problem.multi_label:
        return objectives.MULTI_LABEL_SCALE * float(np.log(2))
    return float(np.log(num_classes))


def ascent(problem: Problem, out, rows, ceiling):
    """Loss of the unlearn set, each row's cut off: an ascent has no bound of its own.

    The ceiling is in units of the loss of guessing.
    """
    most, total = ceiling * guessing(problem), 0.0
    for view in VISUAL:
        each = objectives.cross_entropy_rows(
            getattr(out, view), rows["labels"], multi_label=problem.multi_label
        )
        total += objectives.mean(jnp.minimum(each, most), rows["has_image"])
    return total


def gradient_ascent(problem: Problem) -> Program:
    """Ascend on the unlearn set and do nothing else (Golatkar et al. 2020)."""
    section, sets = problem.section, problem.sets
    steps = problem.steps(section.epochs, section.unlearn_batch, sets.unlearn)

    def loss(params, frozen, aux, batch, step):
        rows = plain(batch["unlearn"])
        out = problem.model.apply(params, rows)
        return -ascent(problem, out, rows, frozen["c"].ceiling), {}

    rows = problem.batches(sets.unlearn, section.unlearn_batch, steps, "unlearn")
    return whole(problem, loss, {"unlearn": rows})


def neggrad_plus(problem: Problem) -> Program:
    """Descend on the retain set, ascend on the unlearn set (Kurmanji et al. 2023).

    `keep * CE(retain) - (1 - keep) * CE(unlearn)`, the latter in the views that see the
    picture.
    """
    judge = classification(problem)

    def loss(params, frozen, aux, batch, step):
        c = frozen["c"]
        out_r, retain, out_u, unlearn = said(problem, params, batch)
        keep = judge(out_r, retain)
        forget = ascent(problem, out_u, unlearn, c.ceiling)
        return c.keep * keep - (1 - c.keep) * forget, {"forget": forget}

    return whole(problem, loss, both(problem, problem.section.epochs))


def random_label(problem: Problem) -> Program:
    """Fit the unlearn set to wrong labels, the retain set to its own (Graves 2021).

    `CE(retain) + weight * CE(unlearn, wrong)`. With `salient` below 1 it is SalUn (Fan
    et al. 2024): only that share of all weights moves, those with the largest gradient
    of the unlearn set's loss.
    """
    judge, section = classification(problem), problem.section
    plan = both(problem, section.epochs)
    optimiser, numbers = None, ()
    if section.salient < 1:
        slope = curvature.gradient(problem, problem.sets.unlearn)
        numbers = {"mask": flatten(branch, largest(slope, section.salient))[0]}
        train = problem.config.train
        optimiser = optax.chain(reference.optimiser(train), curvature.masked())

    def loss(params, frozen, aux, batch, step):
        out_r, retain, out_u, unlearn = said(problem, params, batch)
        total = judge(out_r, retain)
        for view in VISUAL:
            total += frozen["c"].weight * objectives.cross_entropy(
                getattr(out_u, view),
                unlearn["wrong"],
                unlearn["has_image"],
                multi_label=problem.multi_label,
            )
        return total, {}

    program = whole(problem, loss, plan, optimiser=optimiser, numbers=numbers)
    wrong = problem.executor.place(wrong_labels(problem))
    return program._replace(table={**problem.table, "wrong": wrong})


def largest(tree, share: float):
    """1.0 for the share of all entries with the largest size, 0.0 for the others."""
    sizes = [np.abs(x).ravel() for x in jax.device_get(jax.tree.leaves(tree))]
    least = np.quantile(np.concatenate(sizes), 1 - share)
    return jax.tree.map(lambda x: (jnp.abs(x) >= least).astype(jnp.float32), tree)


def wrong_labels(problem: Problem) -> np.ndarray:
    """Labels `[N, K]` of which those of the unlearn set are wrong, at random.

    A single label becomes any other one. Several become those of a random row of the
    retain set: sets of labels stay such as there are.
    """
    labels = np.array(problem.table["labels"])
    rng, rows = problem.rng("labels"), problem.sets.unlearn
    if problem.multi_label:
        labels[rows] = labels[rng.choice(problem.sets.retain, len(rows))]
        return labels
    classes = labels.shape[1]
    true = labels[rows].argmax(1)
    other = (true + rng.integers(1, classes, len(rows))) % classes
    labels[rows] = np.eye(classes, dtype=labels.dtype)[other]
    return labels
