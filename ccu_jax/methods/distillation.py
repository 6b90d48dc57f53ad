"""Unlearning methods from the literature that distill from teacher models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods import programs
from ccu_jax.methods.problem import Problem, Rows
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.methods.stopping import add_rewind
from ccu_jax.models import VISUAL, Outputs
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def scrub(problem: Problem) -> Program:
    """SCRUB (Kurmanji et al. 2023), with the original as the teacher.

    The first `ascent_epochs` epochs begin with steps on the unlearn set that maximize

        sum_{view in VISUAL} KL(teacher || student)

    All epochs have steps on the retain set that minimize

        distill_weight * sum_{view} KL(teacher || student) + task_weight * CE

    `rewind` selects SCRUB+R; see `stopping.add_rewind`.
    """
    config, model = problem.method_config, problem.model
    task_loss = make_task_loss(problem)
    rows, is_ascent = _plan_scrub(problem)

    def loss(params, frozen, aux, batch, step):
        hp, is_ascent = frozen["hp"], frozen["is_ascent"][step]
        rows = augment(batch["rows"], batch["rows"]["key"], problem.config.train)
        # Without dropout, the models agree at first and ascent follows rounding errors.
        student = model.apply(params, rows, keys=rows["key"])
        teacher = model.apply(frozen["teacher"], rows)
        weights = _weights_by_view(rows)
        # In ascent steps, rows whose fused view sees no image have no weight.
        weights["fused"] = jnp.where(is_ascent, rows["has_image"], weights["fused"])
        options = {"multi_label": problem.multi_label, "temperature": hp.temperature}
        kl = _kl_by_view(teacher, student, weights, **options)
        distillation = hp.distill_weight * sum(kl.values())
        descent_loss = distillation + hp.task_weight * task_loss(student, rows)
        return jnp.where(is_ascent, -(kl["image"] + kl["fused"]), descent_loss), {}

    frozen = {"teacher": problem.original, "is_ascent": is_ascent}
    program = programs.make_program(problem, loss, {"rows": rows}, frozen=frozen)
    return add_rewind(problem, program, config.epochs) if config.rewind else program


def _plan_scrub(problem):
    """Returns the plan `[steps, batch]` and padded flags that mark ascent steps."""
    config, sets = problem.method_config, problem.sets
    plan, is_ascent = [], []
    for epoch in range(config.epochs):
        phases = {"push": sets.unlearn} if epoch < config.ascent_epochs else {}
        for name, rows in (phases | {"pull": sets.retain}).items():
            plan.append(problem.plan_epochs(rows, config.batch, f"{name} {epoch}", 1))
            is_ascent += [name == "push"] * len(plan[-1])
    return np.concatenate(plan), programs.pad_flags(np.array(is_ascent))


def bad_teacher(problem: Problem) -> Program:
    """Bad Teacher (Chundawat et al. 2023): distills an untrained model on unlearn rows.

    sum_{view} KL(original || student) on retain rows
    + unlearn_weight * sum_{view in VISUAL} KL(untrained || student) on unlearn rows
    """
    model = problem.model

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        options = {"multi_label": problem.multi_label, "temperature": hp.temperature}
        out_r, retain, out_u, unlearn = programs.forward_both(problem, params, batch)
        teacher_r = model.apply(frozen["teacher"], retain)
        teacher_u = model.apply(frozen["untrained"], unlearn)
        retain_kl = _kl_by_view(teacher_r, out_r, _weights_by_view(retain), **options)
        weights = dict.fromkeys(VISUAL, unlearn["has_image"])
        unlearn_kl = _kl_by_view(teacher_u, out_u, weights, **options)
        unlearn_loss = sum(unlearn_kl.values())
        total = sum(retain_kl.values()) + hp.unlearn_weight * unlearn_loss
        return total, {"forget": unlearn_loss}

    plan = programs.plan_paired_batches(problem)
    frozen = {"teacher": problem.original, "untrained": problem.init_params("ignorant")}
    return programs.make_program(problem, loss, plan, frozen=frozen)


def delete(problem: Problem) -> Program:
    """DELETE (Zhou et al. 2025): distills on unlearn rows with the true class removed.

        sum_{view in VISUAL} KL(original without the true class || student)

    With multiple labels, the original's probability of each true label is replaced by
    the label's frequency in the retain set.
    """
    config, sets, model = problem.method_config, problem.sets, problem.model
    multi_label = problem.multi_label
    labels = np.asarray(problem.table["labels"])[sets.retain]
    frequency = np.clip(labels.mean(0), 0.01, 0.99).astype(np.float32)

    def loss(params, frozen, aux, batch, step):
        rows = programs.scale_images(batch["unlearn"])
        student = model.apply(params, rows)
        teacher = model.apply(frozen["teacher"], rows)
        frequency_logit = jax.scipy.special.logit(frozen["frequency"])
        true_logit = frequency_logit if multi_label else -1e4
        logits = {
            view: jnp.where(rows["labels"] > 0, true_logit, getattr(teacher, view))
            for view in VISUAL
        }
        weights = dict.fromkeys(VISUAL, rows["has_image"])
        kl = _kl_by_view(
            teacher._replace(**logits), student, weights, multi_label=multi_label
        )
        return sum(kl.values()), {}

    unlearn = problem.plan_epochs(sets.unlearn, config.unlearn_batch, "unlearn")
    frozen = {"teacher": problem.original, "frequency": jnp.asarray(frequency)}
    return programs.make_program(problem, loss, {"unlearn": unlearn}, frozen=frozen)


def multidelete(problem: Problem) -> Program:
    """MultiDelete (Cheng & Amiri 2024): decouples images and texts of unlearn rows.

    With d the mean squared distance of features, f the fused and h_v, h_t the image and
    text features, and f*, h* the original's features, it minimizes

        d(f(v, t), f*(v, t')) + d(f, f*)[retain] + d(h_v, h_v*) + d(h_t, h_t*)

    on unlearn rows (the second term: on retain rows); t' is the text of another row.
    """
    model, distance = problem.model, objectives.squared_distance

    def loss(params, frozen, aux, batch, step):
        retain = programs.scale_images(batch["retain"])
        unlearn = programs.scale_images(batch["unlearn"])

        def original(rows):
            return jax.lax.stop_gradient(model.apply(frozen["teacher"], rows))

        decoupled = original({**unlearn, **_texts_of_next_rows(unlearn)})
        out_u, original_u = model.apply(params, unlearn), original(unlearn)
        out_r, original_r = model.apply(params, retain), original(retain)
        has_image, has_text = unlearn["has_image"], unlearn["has_text"]
        has_any = retain["has_image"] | retain["has_text"]
        has_both = has_image & has_text
        terms = {
            "decouple": distance(out_u.h_fused, decoupled.h_fused, has_both),
            "multimodal": distance(out_r.h_fused, original_r.h_fused, has_any),
            "unimodal": distance(out_u.h_image, original_u.h_image, has_image)
            + distance(out_u.h_text, original_u.h_text, has_text),
        }
        return sum(terms.values()), terms

    plan = programs.plan_paired_batches(problem)
    frozen = {"teacher": problem.original}
    return programs.make_program(problem, loss, plan, frozen=frozen)


def _kl_by_view(
    teacher: Outputs, student: Outputs, weights: dict[str, jax.Array], **options: Any
) -> dict[str, jax.Array]:
    """Returns the mean KL(teacher || student) of each view in `weights`."""
    teacher = jax.lax.stop_gradient(teacher)
    return {
        view: objectives.kl_divergence(
            getattr(teacher, view), getattr(student, view), weight, **options
        )
        for view, weight in weights.items()
    }


def _weights_by_view(rows: Rows) -> dict[str, jax.Array]:
    """Returns row weights by view: 1 if the row has a modality of the view, else 0."""
    has_image, has_text = rows["image_weight"], rows["text_weight"]
    fused = jnp.maximum(has_image, has_text)
    return {"image": has_image, "text": has_text, "fused": fused}


def _texts_of_next_rows(rows):
    """Returns the text columns of each row's successor in the global batch."""
    next_B = objectives.global_rows(len(rows["text"])) + 1

    def shift(x):
        rows_G = objectives.all_gather(x)
        return rows_G[next_B % len(rows_G)]

    return {name: shift(rows[name]) for name in ("text", "has_text")}
