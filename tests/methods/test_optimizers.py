"""Schedules, masks and slow weights."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.config.schema import Train
from ccu_jax.methods import optimizers
from ccu_jax.models import TEXT

GROUPS = ("rest", "text")


def test_text_modules_have_their_own_group(problem):
    modules = problem.params
    groups = {module: optimizers.parameter_group(module) for module in modules}
    assert {module for module, group in groups.items() if group == "text"} == {*TEXT}


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_learning_rate_has_warmup_and_cosine_decay(warmup_steps):
    config = Train(weight_decay=0.0, text_lr_scale=0.5)
    params = {group: jnp.ones(2) for group in GROUPS}
    optimizer = optimizers.make_optimizer(config)
    inputs = optimizers.optimizer_inputs(0.1, 12, config, warmup_steps / 12)
    state = optimizer.init(params)
    update = jax.jit(functools.partial(optimizer.update, inputs=inputs))
    expected: Any = optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else 0.1, 0.1, warmup_steps, 12
    )
    for step in range(12):
        updates, state = update(params, state, params)
        # Adam's update for a constant gradient is its sign.
        np.testing.assert_allclose(updates["rest"], -float(expected(step)), atol=1e-6)
        np.testing.assert_allclose(
            updates["text"], -float(expected(step)) / 2, atol=1e-6
        )
    # Steps after the last one, as `with_rewind` adds them.
    for _ in range(2):
        updates, state = update(params, state, params)
        assert not any(x.any() for x in updates.values())


def run_masked(optimizer, config, is_ascent, gradients, mask):
    """Returns the parameters before the first and after each step."""
    inputs = optimizers.optimizer_inputs(0.1, 2 * len(gradients), config)
    inputs = {**inputs, "mask": mask}
    if is_ascent is not None:
        inputs["is_ascent"] = jnp.asarray(is_ascent)
    params: Any = {group: jnp.ones(len(mask[group])) for group in GROUPS}
    state: Any = optimizer.init(params)
    seen = [params]
    for gradient in gradients:
        gradient = dict.fromkeys(GROUPS, jnp.asarray(gradient))
        updates, state = optimizer.update(gradient, state, params, inputs=inputs)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


@pytest.mark.parametrize("only_ascent_steps", [False, True])
def test_masked_parameters_stay_the_same_to_the_bit(only_ascent_steps):
    """Gradients, momentum and weight decay do not move them."""
    rng = np.random.default_rng(0)
    mask = {g: jnp.asarray(rng.random(9) < 0.5, jnp.float32) for g in GROUPS}
    config = Train(weight_decay=0.5)
    optimizer = optax.chain(
        optimizers.make_optimizer(config), optimizers.mask_updates()
    )
    is_ascent = [True, False] * 3 if only_ascent_steps else None
    seen = run_masked(optimizer, config, is_ascent, rng.normal(size=(6, 9)), mask)
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        for group in GROUPS:
            is_open = np.asarray(mask[group]) > 0
            assert is_open.any() and not is_open.all()
            if only_ascent_steps and step % 2:
                is_open = True
            is_moved = np.asarray(before[group]) != np.asarray(after[group])
            assert (is_moved == is_open).all(), (step, group)


def test_masked_parameters_have_no_momentum_of_ascent_steps():
    config = Train(weight_decay=0.0)
    mask = dict.fromkeys(GROUPS, jnp.asarray([0.0, 1, 0, 1, 0, 1]))
    optimizer = optax.chain(
        optimizers.mask_updates(),
        optimizers.make_optimizer(config),
        optimizers.mask_updates(),
    )
    gradients = np.zeros((6, 6))
    gradients[0] = 1
    last = run_masked(optimizer, config, [True, *[False] * 5], gradients, mask)[-1]
    for group in GROUPS:
        is_open = np.asarray(mask[group]) > 0
        np.testing.assert_array_equal(np.asarray(last[group])[~is_open], 1.0)
        assert (np.asarray(last[group])[is_open] < 1).all()


@pytest.mark.parametrize(
    "period, slow_fraction, expected",
    [
        (3, 0.5, [1, 2, 1.5, 2.5, 3.5, 3, 4]),
        (3, 1.0, [1, 2, 3, 4, 5, 6, 7]),
        (1, 0.25, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_lookahead_synchronizes_at_the_end_of_each_period(
    period, slow_fraction, expected
):
    optimizer = optax.chain(optax.sgd(-1.0), optimizers.lookahead())
    inputs = {"slow_fraction": jnp.float32(slow_fraction), "period": jnp.int32(period)}
    params: Any = {"all": jnp.zeros(2)}
    found = []
    state = optimizer.init(params)
    for _ in expected:
        gradient = {"all": jnp.ones(2)}
        updates, state = optimizer.update(gradient, state, params, inputs=inputs)
        params = optax.apply_updates(params, updates)
        found.append(float(jax.tree.leaves(params)[0][1]))
    assert found == expected
