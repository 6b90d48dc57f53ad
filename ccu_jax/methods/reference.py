"""Training with the task loss: the original, and the references for unlearning.

References are models retrained without the unlearn set. They show what exact unlearning
would give, at the cost of training from scratch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods import optimizers
from ccu_jax.methods.problem import Problem
from ccu_jax.models import Outputs, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def make_task_loss(
    problem: Problem,
) -> Callable[[Outputs, dict[str, jax.Array]], jax.Array]:
    """Returns the loss that classifiers are trained with.

        sum_{view} CE(logits_view, labels) + contrastive_weight * InfoNCE(image, text)

    The views are image, text and fused. A row counts in the views of its modalities: a
    row without an image counts in the text view and the fused view.

    Returns:
        `loss(outputs, rows) -> scalar` for rows that `augment` returned. If rows have a
        column `visual`, those with `visual` 0 count in the text view only.
    """
    train, multi_label = problem.train_config, problem.multi_label

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


def make_augmented_task_loss(
    problem: Problem,
) -> Callable[[Params, dict[str, jax.Array]], jax.Array]:
    """Returns `loss(params, rows)`: the task loss on augmented rows, with dropout."""
    task_loss = make_task_loss(problem)

    def loss(params, rows):
        rows = augment(rows, rows["key"], problem.train_config)
        return task_loss(problem.model.apply(params, rows, keys=rows["key"]), rows)

    return loss


def train_classifier(
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

    `config` has `epochs`, `batch` and `learning_rate`; `steps` replaces its epochs.
    The rows `text_only` are trained in the text view only.
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
        optimizer=optimizers.make_optimizer(problem.train_config),
        optimizer_inputs=optimizers.make_optimizer_inputs(
            config.learning_rate, steps, problem.train_config, warmup_fraction
        ),
        group=optimizers.parameter_group,
        table={**problem.table, "visual": problem.executor.replicate(visual)},
        plan={"rows": problem.plan_batches(rows, config.batch, steps, "rows")},
    )


def _train_from_scratch(problem: Problem, rows, **options) -> Program:
    train = problem.train_config
    params = problem.model.init(problem.make_key("init"))
    return train_classifier(
        problem, params, train, rows, warmup_fraction=train.warmup_fraction, **options
    )


def _retain_and_unlearn(problem):
    return np.sort(np.concatenate([problem.sets.retain, problem.sets.unlearn]))


def original(problem: Problem) -> Program:
    """Trains on the retain set and the unlearn set: the model that has to unlearn."""
    return _train_from_scratch(problem, _retain_and_unlearn(problem))


def retrain(problem: Problem) -> Program:
    """Trains on the retain set alone, without images *and* texts of the unlearn set."""
    return _train_from_scratch(problem, problem.sets.retain)


def retrain_visual(problem: Problem) -> Program:
    """Trains on all texts, but without the images of the unlearn set: the reference.

    Image view, fused view and contrastive loss see only the retain set. Unlearned
    models are compared with this one, because only images have to be unlearned.
    """
    rows, unlearn = _retain_and_unlearn(problem), problem.sets.unlearn
    return _train_from_scratch(problem, rows, text_only=unlearn)


def train_shadow(problem: Problem, members: np.ndarray) -> Program:
    """Trains a shadow model: the reference plus some rows as members.

    `members` are rows of the unlearn set and unseen rows, trained on in all views. All
    shadow models take the same number of steps, though they may have more or fewer
    members, because groups stay together.
    """
    sets, train = problem.sets, problem.train_config
    rows = _retain_and_unlearn(problem)
    num_rows = len(rows) + len(sets.unseen) // 2
    return _train_from_scratch(
        problem,
        np.union1d(rows, members),
        text_only=np.setdiff1d(sets.unlearn, members),
        steps=problem.count_steps(train.epochs, train.batch, range(num_rows)),
    )
