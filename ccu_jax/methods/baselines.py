"""Unlearning methods from the literature, all parts of the classifier trained."""

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.augment import augment
from ccu_jax.methods.cache import padded_size, together
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import branch, classification, fit, optimiser
from ccu_jax.models import VISUAL
from ccu_jax.step import Program


def finetune(problem: Problem) -> Program:
    """Train on, with the retain set only."""
    section = problem.config.finetune
    return fit(problem, problem.params, section, problem.sets.retain)


def neggrad_plus(problem: Problem) -> Program:
    """Descend on the retain set, ascend on the unlearn set (Kurmanji et al. 2023).

    `keep * CE(retain) - (1 - keep) * CE(unlearn)`. The ascent is on the views that see
    the picture; the text's own view is left out, since it is not to be forgotten.
    The unlearn set's loss is cut off at `ceiling` times the loss of guessing: the
    ascent has no bound of its own.
    """
    config = problem.config.neggrad_plus
    sets, model, multi_label = problem.sets, problem.model, problem.multi_label
    steps = problem.steps(config.epochs, config.batch, sets.retain)
    judge, train = classification(problem), problem.config.train
    num_classes = problem.table["labels"].shape[1]
    guess = objectives.MULTI_LABEL_SCALE if multi_label else 1.0
    guess *= float(jnp.log(2.0 if multi_label else num_classes))

    def loss(params, frozen, aux, batch, step):
        retain = augment(batch["retain"], batch["retain"]["key"], train)
        rows = dict(batch["unlearn"])
        rows["image"] = rows["image"] / 255.0
        # Both in one pass; the unlearn set as it is, without dropout.
        every, cut = together({"retain": retain, "unlearn": rows}, drop="retain")
        out = cut(model.apply(params, every, keys=every["key"], drop=every["drop"]))
        keep = judge(out["retain"], retain)
        forget = 0.0
        for view in VISUAL:
            each = objectives.cross_entropy_rows(
                getattr(out["unlearn"], view), rows["labels"], multi_label=multi_label
            )
            each = jnp.minimum(each, config.ceiling * guess)
            forget += objectives.mean(each, rows["has_image"])
        total = config.keep * keep - (1 - config.keep) * forget
        return total, {"forget": forget}

    return Program(
        params=problem.params,
        frozen=(),
        loss=loss,
        optimiser=optimiser(config.learning_rate, steps, train),
        group=branch,
        table=problem.table,
        plan={
            "retain": problem.batches(sets.retain, config.batch, steps, "retain"),
            "unlearn": problem.batches(
                sets.unlearn, config.unlearn_batch, steps, "unlearn"
            ),
        },
    )


def scrub(problem: Problem) -> Program:
    """Away from the original on the unlearn set, towards it on the retain set.

    SCRUB (Kurmanji et al. 2023) with the original as teacher: the first epochs begin
    with steps that maximise the divergence on the unlearn set, in the views that see
    the picture; all epochs minimise divergence and loss on the retain set.
    """
    config, train = problem.config.scrub, problem.config.train
    model, multi_label = problem.model, problem.multi_label
    judge = classification(problem)
    plan, push = _scrub_plan(problem)
    # Of one of few lengths, so that other sets need no other program.
    push = np.pad(push, (0, padded_size(len(push), 1) - len(push)))

    def loss(params, frozen, aux, batch, step):
        teacher = frozen["teacher"]
        rows = augment(batch["rows"], batch["rows"]["key"], train)
        # The student with dropout, as in training: without it both say the same at
        # first, and the push would follow rounding errors.
        said = model.apply(params, rows, keys=rows["key"])
        taught = model.apply(teacher, rows)
        pushing = frozen["push"][step]
        # Away from what it says of pictures, back to what it says of all rows.
        see, read = rows["image_weight"], rows["text_weight"]
        fused = jnp.where(pushing, rows["has_image"], jnp.maximum(see, read))
        near = {
            view: objectives.divergence(
                jax.lax.stop_gradient(getattr(taught, view)),
                getattr(said, view),
                weight,
                multi_label=multi_label,
                temperature=config.temperature,
            )
            for view, weight in {"image": see, "text": read, "fused": fused}.items()
        }
        pull = config.distil * sum(near.values())
        pull += config.classify * judge(said, rows)
        return jnp.where(pushing, -(near["image"] + near["fused"]), pull), {}

    return Program(
        params=problem.params,
        frozen={"teacher": problem.params, "push": jnp.asarray(push)},
        loss=loss,
        optimiser=optimiser(config.learning_rate, len(plan), train),
        group=branch,
        table=problem.table,
        plan={"rows": plan},
    )


def _scrub_plan(problem):
    """Rows of each step, and which steps push away: `[steps, batch]`, `[steps]`."""
    config, sets = problem.config.scrub, problem.sets
    num_push = problem.steps(1, config.batch, sets.unlearn)
    num_pull = problem.steps(1, config.batch, sets.retain)
    rows, push = [], []
    for epoch in range(config.epochs):
        parts = [("pull", sets.retain, num_pull)]
        if epoch < config.max_epochs:
            parts.insert(0, ("push", sets.unlearn, num_push))
        for name, of, steps in parts:
            name = f"{name} {epoch}"
            rows.append(problem.batches(of, config.batch, steps, name))
            push += [name.startswith("push")] * steps
    return np.concatenate(rows), np.array(push)
