"""CF-k and EU-k (Goel et al. 2022): unlearning by the last layers alone.

CF-k fine-tunes the last k layers on the retain set (catastrophic forgetting), EU-k
trains them from scratch (exact unlearning). Earlier layers stay, so both run on cached
features. They are the baseline for other methods that train the same layers.
"""

import jax
import jax.numpy as jnp
import optax

from ccu_jax.methods.cached_features import build_feature_tables, split_modules
from ccu_jax.methods.optimizers import cosine_schedule, scale_by_learning_rate
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import TAIL
from ccu_jax.models.augmentation import drop_modalities
from ccu_jax.train.program import Program

LAYERS = {"head": ("image_projection", "image_head", "fused_head"), "tail": TAIL}


def train_last_layers(problem: Problem) -> Program:
    """Trains the last image layers on the retain set, with the task loss.

    With `reinitialize` (EU-k) they start from random parameters, else (CF-k) from the
    original's.
    """
    config, train = problem.method_config, problem.train_config
    cached = build_feature_tables(problem, config.max_retain_rows)
    params, frozen_modules = split_modules(problem, LAYERS[config.layers])
    if config.reinitialize:
        fresh = problem.model.init(problem.make_key("fresh"))
        fresh = problem.executor.replicate(fresh)
        params = {name: fresh[name] for name in params}
    task_loss = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        inputs = _drop_modalities(batch["retain"], train.modality_dropout)
        params = {**frozen["modules"], **params}
        outputs = problem.model.apply(params, inputs, keys=inputs["key"])
        return task_loss(outputs, inputs), {}

    retain = cached.rows["retain"]
    positions = range(len(retain))
    steps = problem.count_steps(config.epochs, config.batch, positions)
    plan = problem.plan_batches(
        positions, config.batch, steps, "retain", dataset_rows=retain
    )
    return Program(
        params=params,
        frozen={"modules": frozen_modules},
        loss=loss,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.98),
            optax.add_decayed_weights(train.weight_decay),
            scale_by_learning_rate(),
        ),
        optimizer_inputs={
            "rate": {"all": cosine_schedule(config.learning_rate, steps)}
        },
        sharded_tables={"retain": cached.tables["retain"]},
        plan={"retain": plan},
    )


def _drop_modalities(rows: dict[str, jax.Array], rate: float) -> dict[str, jax.Array]:
    has_image, has_text = drop_modalities(
        rows["has_image"], rows["has_text"], rows["key"], rate
    )
    return {
        **rows,
        "has_image": has_image,
        "has_text": has_text,
        "image_weight": rows["has_image"].astype(jnp.float32),
        "text_weight": rows["has_text"].astype(jnp.float32),
    }
