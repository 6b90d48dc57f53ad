"""Unlearning methods from the literature that fine-tune the original.

They minimize the task loss on the retain set, a loss that undoes learning on the
unlearn set, or both. Only images have to be unlearned: terms that undo learning apply
to the views that see the image (`VISUAL`), and the retain loss preserves the text view.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods import programs, reference
from ccu_jax.methods.cached_features import build_feature_tables
from ccu_jax.methods.problem import Problem, Rows
from ccu_jax.models import TAIL, Outputs, l2_normalize
from ccu_jax.models.augmentation import augment, drop_modalities
from ccu_jax.objectives import LabeledFeatures
from ccu_jax.train.program import Program

# The modules that CF-k and EU-k train, by `config.layers`.
LAYERS = {"head": ("image_projection", "image_head", "fused_head"), "tail": TAIL}


def finetune(problem: Problem) -> Program:
    """Fine-tunes the original on the retain set."""
    config, retain = problem.method_config, problem.sets.retain
    return reference.make_training_program(problem, problem.original, config, retain)


def l1_sparse(problem: Problem) -> Program:
    """l1-sparse (Jia et al. 2023): fine-tunes with a decaying L1 penalty.

    CE(retain) + l1_weight * (1 - step / steps) * |params|_1
    """
    config, retain = problem.method_config, problem.sets.retain
    rows = problem.plan_epochs(retain, config.batch, "rows")
    task_loss = reference.make_augmented_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        l1_norm = sum(jnp.abs(x).sum() for x in jax.tree.leaves(params))
        decay = jnp.maximum(1 - step / frozen["steps"], 0)
        total = task_loss(params, batch["rows"])
        if hp.is_active("l1_weight"):
            total += hp.l1_weight * decay * l1_norm
        return total, {}

    return programs.make_program(
        problem, loss, {"rows": rows}, frozen={"steps": np.float32(len(rows))}
    )


def coun(problem: Problem) -> Program:
    """CoUn (Khalil et al. 2025): fine-tunes with a contrastive loss on the retain set.

        CE(retain) + contrast_weight * InfoNCE

    between two augmentations of the same retain image. The unlearn set is not used;
    its predictions change with those of similar retain rows.
    """
    config, train = problem.method_config, problem.config.train
    task_loss = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp, rows = frozen["hp"], batch["retain"]
        second_keys = jax.vmap(jax.random.fold_in, (0, None))(rows["key"], 7)
        first = augment(rows, rows["key"], train)
        second = {**augment(rows, second_keys, train), "key": second_keys}
        parts = {"first": first, "second": second}
        outputs = programs.forward_parts(problem.model, params, parts, tuple(parts))
        contrast = objectives.info_nce(
            l2_normalize(outputs["first"].h_image),
            l2_normalize(outputs["second"].h_image),
            first["image_weight"],
            temperature=hp.temperature,
        )
        total = task_loss(outputs["first"], first) + hp.contrast_weight * contrast
        return total, {"contrast": contrast}

    retain = problem.plan_epochs(problem.sets.retain, config.batch, "retain")
    return programs.make_program(problem, loss, {"retain": retain})


def train_last_layers(problem: Problem) -> Program:
    """CF-k and EU-k (Goel et al. 2022): trains the last image layers on the retain set.

    CF-k fine-tunes them (catastrophic forgetting); EU-k, with `reinitialize`, trains
    them from random parameters (exact unlearning). Earlier layers are frozen, so both
    use cached features. They are the baselines of CCU, which trains the same layers.
    """
    config, train = problem.method_config, problem.config.train
    cached = build_feature_tables(problem, config.max_retain_rows)
    task_loss = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        inputs = drop_modalities(batch["retain"], train.modality_dropout)
        params = {**frozen["modules"], **params}
        outputs = problem.model.apply(params, inputs, keys=inputs["key"])
        return task_loss(outputs, inputs), {}

    retain = cached.rows["retain"]
    steps = problem.count_steps(config.epochs, config.batch, retain)
    plan = problem.plan_batches(retain, config.batch, steps, "retain", by_index=True)
    modules, tables = LAYERS[config.layers], {"retain": cached.tables["retain"]}
    program = programs.make_program(
        problem, loss, {"retain": plan}, modules=modules, sharded_tables=tables
    )
    if config.reinitialize:
        fresh = problem.init_params("fresh")
        params = {name: fresh[name] for name in program.params}
        program = program._replace(params=params)
    return program


def gradient_ascent(problem: Problem) -> Program:
    """Gradient ascent (Golatkar et al. 2020): maximizes the unlearn set's loss.

    -sum_{view in VISUAL} min(CE(unlearn), cap)
    """
    config = problem.method_config

    def loss(params, frozen, aux, batch, step):
        rows = programs.scale_images(batch["unlearn"])
        outputs = problem.model.apply(params, rows)
        return -capped_loss(problem, outputs, rows, frozen["hp"].loss_cap), {}

    rows, batch = problem.sets.unlearn, config.unlearn_batch
    unlearn = problem.plan_epochs(rows, batch, "unlearn")
    return programs.make_program(problem, loss, {"unlearn": unlearn})


def capped_loss(problem: Problem, outputs: Outputs, rows: Rows, cap: Any) -> jax.Array:
    """Returns the visual cross-entropy, capped per row at `cap * chance_loss`."""
    max_loss, total = cap * programs.chance_loss(problem), jnp.zeros(())
    losses = programs.visual_losses(outputs, rows["labels"], problem.multi_label)
    for loss_B in losses:
        total += objectives.mean(jnp.minimum(loss_B, max_loss), rows["has_image"])
    return total


def neggrad_plus(problem: Problem) -> Program:
    """NegGrad+ (Kurmanji et al. 2023): descent on retain rows, ascent on unlearn rows.

        retain_weight * CE(retain) - (1 - retain_weight) * CE(unlearn)

    The loss of the unlearn set is that of `gradient_ascent`.
    """
    task_loss = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        out_r, retain, out_u, unlearn = programs.forward_both(problem, params, batch)
        retain_loss = task_loss(out_r, retain)
        unlearn_loss = capped_loss(problem, out_u, unlearn, hp.loss_cap)
        total = hp.retain_weight * retain_loss - (1 - hp.retain_weight) * unlearn_loss
        return total, {"forget": unlearn_loss}

    plan = programs.plan_paired_batches(problem)
    return programs.make_program(problem, loss, plan)


def contrastive_unlearning(problem: Problem) -> Program:
    """Contrastive Unlearning (Lee et al. 2024): contrasts unlearn and retain images.

        contrast_weight * inverse_contrast(pull=1) + task_weight * CE(retain)

    on the features before the head: unlearn images are pushed away from retain images
    of their class and pulled towards other classes. Each unlearn batch is used with
    `repeats` retain batches. As in the authors' code, gradients reach retain features.
    """
    config, sets = problem.method_config, problem.sets
    unlearn = problem.plan_epochs(sets.unlearn, config.unlearn_batch, "unlearn")
    unlearn = np.repeat(unlearn, config.repeats, axis=0)
    retain = problem.plan_batches(sets.retain, config.batch, len(unlearn), "retain")
    task_loss = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        out_r, retain, out_u, unlearn = programs.forward_both(problem, params, batch)
        h_u, h_r = l2_normalize(out_u.h_image), l2_normalize(out_r.h_image)
        push = objectives.inverse_contrast(
            LabeledFeatures(h_u, unlearn["labels"], unlearn["has_image"]),
            LabeledFeatures(h_r, retain["labels"], retain["image_weight"]),
            temperature=hp.temperature,
            pull=1.0,
            stop_retain_gradient=False,
        )
        total = hp.contrast_weight * push + hp.task_weight * task_loss(out_r, retain)
        return total, {"push": push}

    plan = {"retain": retain, "unlearn": unlearn}
    return programs.make_program(problem, loss, plan)
