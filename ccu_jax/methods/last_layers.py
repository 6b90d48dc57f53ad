"""Unlearning by the last layers alone: catastrophic forgetting, exact unlearning.

CF-k trains the last k layers on with the retain set, EU-k trains them anew (Goel et al.
2022). Layers before them stay, so both work on stored features: cheap, and a control
that a method on the same layers must beat.
"""

import jax.numpy as jnp
import optax

from ccu_jax.methods.cached_features import build_feature_tables
from ccu_jax.methods.hyperparameters import Hyperparameters
from ccu_jax.methods.optimizers import (
    CosineSchedule,
    cosine_schedule,
    scale_by_learning_rate,
)
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import TAIL
from ccu_jax.models.augmentation import hide
from ccu_jax.train.program import Program

LAYERS = {"head": ("image_projection", "image_head", "fused_head"), "tail": TAIL}


def train_last_layers(problem: Problem) -> Program:
    """Train the image's last layers on the retain set, anew with `reinitialize`."""
    section, train = problem.method_config, problem.config.train
    parts = LAYERS[section.layers]
    cached = build_feature_tables(problem, section.max_retain_rows)
    start = problem.params
    if section.reinitialize:
        start = problem.executor.replicate(
            problem.model.init(problem.make_key("fresh"))
        )
    judge = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        rows = batch["retain"]
        see, read = hide(
            rows["has_image"], rows["has_text"], rows["key"], train.modality_dropout
        )
        shown = {
            **rows,
            "has_image": see,
            "has_text": read,
            "image_weight": rows["has_image"].astype(jnp.float32),
            "text_weight": rows["has_text"].astype(jnp.float32),
        }
        params = {**frozen["parts"], **params}
        out = problem.model.apply(params, shown, keys=rows["key"])
        return judge(out, shown), {}

    count = len(cached.rows["retain"])
    steps = problem.count_steps(section.epochs, section.batch, range(count))
    numbers: dict[str, dict[str, CosineSchedule]] = {
        "rate": {"all": cosine_schedule(section.learning_rate, steps)}
    }
    rest = {name: x for name, x in problem.params.items() if name not in parts}
    return Program(
        params={name: start[name] for name in parts},
        frozen={"parts": rest, "c": Hyperparameters.from_section(section)},
        loss=loss,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.98),
            optax.add_decayed_weights(train.weight_decay),
            scale_by_learning_rate(),
        ),
        optimizer_inputs=numbers,
        sharded_tables={"retain": cached.parts["retain"]},
        plan={
            "retain": problem.plan_batches(
                range(count), section.batch, steps, "retain", of=cached.rows["retain"]
            )
        },
    )
