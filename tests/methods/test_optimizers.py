"""Schedules, masks and slow weights."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.config.schema import Train
from ccu_jax.methods import optimizers
from ccu_jax.methods.optimizers import GROUPS
from ccu_jax.models import TEXT


def test_text_modules_have_their_own_group(problem):
    groups = {module: optimizers.parameter_group(module) for module in problem.params}
    assert {module for module, group in groups.items() if group == "text"} == {*TEXT}


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_learning_rate_has_warmup_and_cosine_decay(warmup_steps):
    config = Train(text_lr_scale=0.5)
    rates = optimizers.make_optimizer_inputs(0.1, 12, config, warmup_steps / 12)["rate"]
    expected: Any = optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else 0.1, 0.1, warmup_steps, 12
    )
    # Steps from 12 on are those that `add_rewind` appends.
    for step in range(14):
        rate = float(expected(step))
        assert float(rates["rest"].rate_at(step)) == pytest.approx(rate, abs=1e-6)
        assert float(rates["text"].rate_at(step)) == pytest.approx(rate / 2, abs=1e-6)


def test_update_of_adam_is_the_learning_rate_of_the_group():
    config = Train(weight_decay=0.0, text_lr_scale=0.5)
    inputs = optimizers.make_optimizer_inputs(0.1, 12, config)
    params = {group: jnp.ones(2) for group in GROUPS}
    optimizer = optimizers.make_optimizer(config)
    _, after = run_steps(optimizer, inputs, params, np.ones((1, 2)))
    # The first update for any gradient is its sign.
    np.testing.assert_allclose(after["rest"], 1 - 0.1, atol=1e-6)
    np.testing.assert_allclose(after["text"], 1 - 0.05, atol=1e-6)


def run_steps(optimizer, inputs, params: Any, gradients):
    """Returns the parameters before the first and after each step."""
    state: Any = optimizer.init(params)
    steps = [params]
    for gradient in gradients:
        gradient = dict.fromkeys(params, jnp.asarray(gradient))
        updates, state = optimizer.update(gradient, state, params, inputs=inputs)
        params = optax.apply_updates(params, updates)
        steps.append(params)
    return steps


def run_masked(optimizer, config, is_ascent, gradients, mask):
    rates = optimizers.make_optimizer_inputs(0.1, 2 * len(gradients), config)
    flags = {} if is_ascent is None else {"is_ascent": jnp.asarray(is_ascent)}
    params = {group: jnp.ones(len(mask[group])) for group in GROUPS}
    return run_steps(optimizer, {**rates, **flags, "mask": mask}, params, gradients)


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
    steps = run_masked(optimizer, config, is_ascent, rng.normal(size=(6, 9)), mask)
    for step, (before, after) in enumerate(itertools.pairwise(steps)):
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
        assert ((last[group] < 1) == (mask[group] > 0)).all()


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
    gradients = np.ones((len(expected), 2))
    steps = run_steps(optimizer, inputs, {"all": jnp.zeros(2)}, gradients)
    assert [float(params["all"][1]) for params in steps[1:]] == expected
