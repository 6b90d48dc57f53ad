"""Optax transformations whose learning rates, masks and periods are traced.

They read these values from `inputs` (`Program.optimizer_inputs`) at each update, so
that runs with different values share one executable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax.config.schema import Train
from ccu_jax.models import TEXT

GROUPS = ("rest", "text")


class CosineSchedule(NamedTuple):
    """A learning rate with linear warmup and cosine decay (Loshchilov & Hutter 2017).

    The rate is `peak` after `warmup_steps` and 0 from step `steps` on.
    """

    peak: jax.Array | np.float32
    warmup_steps: jax.Array | np.float32
    steps: jax.Array | np.float32

    def rate_at(self, step: jax.Array | int) -> jax.Array:
        """Returns the learning rate at a step."""
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak * jnp.where(
            step < self.warmup_steps,
            step / jnp.maximum(self.warmup_steps, 1),
            (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1))) / 2,
        )


def parameter_group(module: str) -> str:
    """Returns the parameter group of a module: "text" or "rest"."""
    return "text" if module in TEXT else "rest"


def make_optimizer_inputs(
    learning_rate: float, steps: int, config: Train, warmup_fraction: float = 0.0
) -> dict[str, dict[str, CosineSchedule]]:
    """Returns the inputs of `make_optimizer`: a schedule per parameter group."""
    warmup_steps = min(round(warmup_fraction * steps), steps - 1)
    peaks = {"rest": learning_rate, "text": learning_rate * config.text_lr_scale}
    return {
        "rate": {
            group: CosineSchedule(*map(np.float32, (peak, warmup_steps, steps)))
            for group, peak in peaks.items()
        }
    }


def make_optimizer(config: Train) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with gradient clipping and a schedule per parameter group."""

    def adamw(group):
        return optax.chain(
            optax.scale_by_adam(b2=0.98),
            optax.add_decayed_weights(config.weight_decay),
            scale_by_learning_rate(group),
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {group: adamw(group) for group in GROUPS},
            lambda params: {group: group for group in params},
        ),
    )


def scale_by_learning_rate(group: str) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the negative learning rate of `inputs["rate"][group]`."""

    def update(updates, state, params=None, **extra_args):
        rate = extra_args["inputs"]["rate"][group].rate_at(state)
        return jax.tree.map(lambda x: -rate * x, updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)


def mask_updates() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `inputs["mask"]`, a pytree of zeros and ones.

    If `inputs["is_ascent"]` has a flag per step, only true steps are masked.
    """

    def update(updates, state, params=None, **extra_args):
        mask = extra_args["inputs"]["mask"]
        if "is_ascent" in extra_args["inputs"]:
            is_ascent = extra_args["inputs"]["is_ascent"][state]
            mask = jax.tree.map(lambda x: jnp.where(is_ascent, x, 1.0), mask)
        return jax.tree.map(jnp.multiply, updates, mask), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)


def lookahead() -> optax.GradientTransformationExtraArgs:
    """Synchronizes parameters with slow weights (Lookahead, Zhang et al. 2019).

    Every `inputs["period"]` steps the slow weights move the fraction
    `inputs["slow_fraction"]` of the way to the current (fast) parameters, and the
    parameters are set to the slow weights.
    """

    def update(updates, state, params: Any = None, **extra_args):
        inputs = extra_args["inputs"]
        count, slow = state
        is_sync = (count + 1) % inputs["period"] == 0
        fast = optax.apply_updates(params, updates)
        synced = jax.tree.map(
            lambda a, b: a + inputs["slow_fraction"] * (b - a), slow, fast
        )
        new_fast, new_slow = (
            jax.tree.map(lambda a, b: jnp.where(is_sync, a, b), synced, otherwise)
            for otherwise in (fast, slow)
        )
        updates = jax.tree.map(jnp.subtract, new_fast, params)
        return updates, (count + 1, new_slow)

    def init(params):
        return jnp.int32(0), jax.tree.map(jnp.copy, params)

    return optax.GradientTransformationExtraArgs(init, update)
