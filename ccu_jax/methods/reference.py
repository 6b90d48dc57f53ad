"""Training with the task loss: the original, and the references for unlearning.

References are models retrained without the unlearn set: they show the result of exact
unlearning, at the cost of training from scratch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods import optimizers
from ccu_jax.methods.problem import Problem, Rows
from ccu_jax.models import Outputs, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def make_task_loss(problem: Problem) -> Callable[[Outputs, Rows], jax.Array]:
    """Returns the training loss of classifiers.

        sum_{view} CE(logits_view, labels) + contrastive_weight * InfoNCE(image, text)

    The views are image, text and fused. Rows without an image are left out of the image
    view, rows without a text out of the text view.

    Returns:
        `loss(outputs, rows) -> scalar` for rows that `augment` returned. Rows
        whose optional column `visual` is 0 contribute to the text view only.
    """
    train, multi_label = problem.config.train, problem.multi_label

    def loss(outputs, rows):
        has_image, has_text = rows["image_weight"], rows["text_weight"]
        visual = rows.get("visual", 1.0)
        weights = {
            "image": has_image * visual,
            "text": has_text,
            "fused": jnp.maximum(has_image, has_text) * visual,
        }
        total = train.contrastive_weight * objectives.info_nce(
            outputs.z_image,
            outputs.z_text,
            has_image * has_text * visual,
            temperature=train.temperature,
        )
        target = rows["labels"]
        if train.label_smoothing:
            uniform = 0.5 if multi_label else 1 / target.shape[1]
            target = target + train.label_smoothing * (uniform - target)
        for view, weight in weights.items():
            total += objectives.cross_entropy(
                getattr(outputs, view), target, weight, multi_label=multi_label
            )
        return total

    return loss


def make_augmented_task_loss(problem: Problem) -> Callable[[Params, Rows], jax.Array]:
    """Returns `loss(params, rows)`, the task loss with augmentation and dropout."""
    task_loss = make_task_loss(problem)

    def loss(params, rows):
        rows = augment(rows, rows["key"], problem.config.train)
        return task_loss(problem.model.apply(params, rows, keys=rows["key"]), rows)

    return loss


def make_training_program(
    problem: Problem,
    params: Params,
    config: Any,
    rows: np.ndarray,
    *,
    warmup_fraction: float = 0.0,
    text_only: np.ndarray | tuple[()] = (),
    steps: int | None = None,
) -> Program:
    """Returns a program that trains all modules with the task loss.

    `config` has `epochs`, `batch` and `learning_rate`; `steps` overrides `epochs`.
    Rows in `text_only` contribute to the text view only.
    """
    visual = np.ones(len(problem.table["labels"]), np.float32)
    visual[np.asarray(text_only, int)] = 0.0
    task_loss = make_augmented_task_loss(problem)
    steps = steps or problem.count_steps(config.epochs, config.batch, rows)

    def loss(params, frozen, aux, batch, step):
        return task_loss(params, batch["rows"]), {}

    return Program(
        params=params,
        frozen=(),
        loss=loss,
        optimizer=optimizers.make_optimizer(problem.config.train),
        optimizer_inputs=optimizers.make_optimizer_inputs(
            config.learning_rate, steps, problem.config.train, warmup_fraction
        ),
        group=optimizers.parameter_group,
        table={**problem.table, "visual": problem.executor.replicate(visual)},
        plan={"rows": problem.plan_batches(rows, config.batch, steps, "rows")},
    )


def _make_scratch_program(problem: Problem, rows, **options) -> Program:
    """Returns a program that trains a new model on `rows`."""
    train = problem.config.train
    params = problem.model.init(problem.make_key("init"))
    return make_training_program(
        problem, params, train, rows, warmup_fraction=train.warmup_fraction, **options
    )


def _training_rows(problem):
    """Returns the sorted rows of the retain set and the unlearn set."""
    return np.sort(np.concatenate([problem.sets.retain, problem.sets.unlearn]))


def original(problem: Problem) -> Program:
    """Trains the original model on the retain and unlearn sets."""
    return _make_scratch_program(problem, _training_rows(problem))


def retrain(problem: Problem) -> Program:
    """Trains on the retain set only, without images *and* texts of the unlearn set."""
    return _make_scratch_program(problem, problem.sets.retain)


def retrain_visual(problem: Problem) -> Program:
    """Trains the reference on all texts, but without the images of the unlearn set.

    The image view, the fused view and the contrastive loss use only the retain set.
    Unlearned models are compared with it, because only images have to be unlearned.
    """
    rows, unlearn = _training_rows(problem), problem.sets.unlearn
    return _make_scratch_program(problem, rows, text_only=unlearn)


def make_shadow_program(problem: Problem, members: np.ndarray) -> Program:
    """Returns the program of a shadow model: the reference, also trained on `members`.

    `members` are rows of the unlearn set and unseen rows, trained in all views. All
    shadow models run the same number of steps, whatever their number of members.
    """
    sets, train = problem.sets, problem.config.train
    rows = _training_rows(problem)
    num_rows = len(rows) + len(sets.unseen) // 2
    return _make_scratch_program(
        problem,
        np.union1d(rows, members),
        text_only=np.setdiff1d(sets.unlearn, members),
        steps=problem.count_steps(train.epochs, train.batch, range(num_rows)),
    )
