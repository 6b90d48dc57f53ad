"""Unlearning methods from the literature that learn from teachers."""

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods.cached_features import padded_size
from ccu_jax.methods.full_model import (
    forward_both,
    paired_batches,
    train_all_modules,
    unaugmented,
)
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.methods.stopping import with_rewind
from ccu_jax.models import VIEWS, VISUAL
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def scrub(problem: Problem) -> Program:
    """Away from the original on the unlearn set, towards it on the retain set.

    SCRUB (Kurmanji et al. 2023) with the original as teacher: the first epochs begin
    with steps that maximise the divergence on the unlearn set, in the views that see
    the picture; all epochs minimise divergence and loss on the retain set. With
    `rewind` it is SCRUB+R, see `stopping.with_rewind`.
    """
    section, train = problem.method_config, problem.config.train
    model, multi_label = problem.model, problem.multi_label
    judge = make_task_loss(problem)
    plan, push = _scrub_plan(problem)
    # Of one of few lengths, so that other sets need no other program.
    push = np.pad(push, (0, padded_size(len(push) + 32, 1) - len(push)))

    def loss(params, frozen, aux, batch, step):
        c, teacher = frozen["c"], frozen["teacher"]
        rows = augment(batch["rows"], batch["rows"]["key"], train)
        # The student with dropout, as in training: without it both say the same at
        # first, and the push would follow rounding errors.
        student = model.apply(params, rows, keys=rows["key"])
        taught = model.apply(teacher, rows)
        pushing = frozen["push"][step]
        # Away from what it says of pictures, back to what it says of all rows.
        see, read = rows["image_weight"], rows["text_weight"]
        fused = jnp.where(pushing, rows["has_image"], jnp.maximum(see, read))
        near = {
            view: objectives.divergence(
                jax.lax.stop_gradient(getattr(taught, view)),
                getattr(student, view),
                weight,
                multi_label=multi_label,
                temperature=c.temperature,
            )
            for view, weight in {"image": see, "text": read, "fused": fused}.items()
        }
        pull = c.distill_weight * sum(near.values()) + c.task_weight * judge(
            student, rows
        )
        return jnp.where(pushing, -(near["image"] + near["fused"]), pull), {}

    program = train_all_modules(
        problem,
        loss,
        {"rows": plan},
        frozen={"teacher": problem.params, "push": jnp.asarray(push)},
    )
    return with_rewind(problem, program, section.epochs) if section.rewind else program


def _scrub_plan(problem):
    """Rows of each step, and which steps push away: `[steps, batch]`, `[steps]`."""
    section, sets = problem.method_config, problem.sets
    num_push = problem.count_steps(1, section.batch, sets.unlearn)
    num_pull = problem.count_steps(1, section.batch, sets.retain)
    rows, push = [], []
    for epoch in range(section.epochs):
        parts = [("pull", sets.retain, num_pull)]
        if epoch < section.ascent_epochs:
            parts.insert(0, ("push", sets.unlearn, num_push))
        for name, of, steps in parts:
            name = f"{name} {epoch}"
            rows.append(problem.plan_batches(of, section.batch, steps, name))
            push += [name.startswith("push")] * steps
    return np.concatenate(rows), np.array(push)


def bad_teacher(problem: Problem) -> Program:
    """Learn the unlearn set from a model that knows nothing (Chundawat et al. 2023).

    KL divergence from an untrained model's word on the unlearn set, in the views that
    see the picture, and from the original's on the retain set, in all views.
    """
    section, model = problem.method_config, problem.model
    ignorant = problem.executor.replicate(model.init(problem.make_key("ignorant")))

    def loss(params, frozen, aux, batch, step):
        kind = {
            "multi_label": problem.multi_label,
            "temperature": frozen["c"].temperature,
        }
        out_r, retain, out_u, unlearn = forward_both(problem, params, batch)
        told_r = jax.lax.stop_gradient(model.apply(frozen["teacher"], retain))
        told_u = jax.lax.stop_gradient(model.apply(frozen["ignorant"], unlearn))
        see, read = retain["image_weight"], retain["text_weight"]
        weight = {"image": see, "text": read, "fused": jnp.maximum(see, read)}
        keep = sum(
            objectives.divergence(
                getattr(told_r, view), getattr(out_r, view), weight[view], **kind
            )
            for view in VIEWS
        )
        forget = sum(
            objectives.divergence(
                getattr(told_u, view),
                getattr(out_u, view),
                unlearn["has_image"],
                **kind,
            )
            for view in VISUAL
        )
        return keep + frozen["c"].unlearn_weight * forget, {"forget": forget}

    return train_all_modules(
        problem,
        loss,
        paired_batches(problem, section.epochs),
        frozen={"teacher": problem.params, "ignorant": ignorant},
    )


def delete(problem: Problem) -> Program:
    """Learn of the unlearn set what the original says but for the truth.

    DELETE (Zhou et al. 2025): the targets are the original's predictions without the
    true class; the retain set is not looked at. Several labels: the original's
    probability of each true one gives way to how common it is in the retain set.
    """
    section, sets, model = problem.method_config, problem.sets, problem.model
    multi_label = problem.multi_label
    labels = np.asarray(problem.table["labels"])[sets.retain]
    common = np.clip(labels.mean(0), 0.01, 0.99).astype(np.float32)
    steps = problem.count_steps(section.epochs, section.unlearn_batch, sets.unlearn)

    def loss(params, frozen, aux, batch, step):
        rows = unaugmented(batch["unlearn"])
        out = model.apply(params, rows)
        told = jax.lax.stop_gradient(model.apply(frozen["teacher"], rows))
        never = jax.scipy.special.logit(frozen["common"]) if multi_label else -1e4
        total = sum(
            objectives.divergence(
                jnp.where(rows["labels"] > 0, never, getattr(told, view)),
                getattr(out, view),
                rows["has_image"],
                multi_label=multi_label,
            )
            for view in VISUAL
        )
        return total, {}

    rows = problem.plan_batches(sets.unlearn, section.unlearn_batch, steps, "unlearn")
    frozen = {"teacher": problem.params, "common": jnp.asarray(common)}
    return train_all_modules(problem, loss, {"unlearn": rows}, frozen=frozen)


def multidelete(problem: Problem) -> Program:
    """Decouple picture from text, keep both by themselves (Cheng & Amiri 2024).

    MultiDelete: squared distances of the fused feature of an unlearn row to the
    original's for its picture with another row's text; of retain rows' fused features,
    and of the unlearn set's picture and text features, to the original's.
    """
    section, model = problem.method_config, problem.model

    def loss(params, frozen, aux, batch, step):
        retain, unlearn = unaugmented(batch["retain"]), unaugmented(batch["unlearn"])
        teacher = frozen["teacher"]

        def told(rows):
            return jax.lax.stop_gradient(model.apply(teacher, rows))

        apart = told({**unlearn, **_of_next(unlearn)})
        out_u, was_u = model.apply(params, unlearn), told(unlearn)
        out_r, was_r = model.apply(params, retain), told(retain)
        see, read = unlearn["has_image"], unlearn["has_text"]
        either = retain["has_image"] | retain["has_text"]
        far = objectives.distance
        terms = {
            "decouple": far(out_u.h_fused, apart.h_fused, see & read),
            "multimodal": far(out_r.h_fused, was_r.h_fused, either),
            "unimodal": far(out_u.h_image, was_u.h_image, see)
            + far(out_u.h_text, was_u.h_text, read),
        }
        return sum(terms.values()), terms

    return train_all_modules(
        problem,
        loss,
        paired_batches(problem, section.epochs),
        frozen={"teacher": problem.params},
    )


def _of_next(rows):
    """The text of the next row of the global batch, whatever device has it."""
    count = len(rows["text"])
    own = jax.lax.axis_index(AXIS) * count + jnp.arange(count)

    def next_of(x):
        every = objectives.gather(x)
        return every[(own + 1) % len(every)]

    return {name: next_of(rows[name]) for name in ("text", "has_text")}
