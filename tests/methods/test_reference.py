"""The rows that the reference learns from, and their order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.config.schema import Corruptions
from ccu_jax.data import corruptions
from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import gather_rows
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods import METHODS
from tests import toy


def test_reference_does_not_depend_on_unlearn_images(problem):
    train = {"learning_rate": 1e-2, "word_dropout": 0.0}
    problem = problem._replace(config=toy.make_config(train=train))
    rows = jnp.asarray(problem.sets.unlearn)
    program = METHODS["retrain_visual"](problem)
    assert program.loss is not None
    keys = jax.random.split(jax.random.key(0), len(rows))

    def gradient(table):
        batch = {"rows": gather_rows(table, {"rows": rows}) | {"key": keys}}

        def loss(params):
            return jax.lax.pmean(program.loss(params, (), (), batch, 0)[0], AXIS)

        return jax.lax.pmean(jax.grad(loss)(program.params), AXIS)

    gradient = jax.jit(toy.on_one_device(gradient))
    before = gradient(program.table)
    changed = {**program.table, "image": 255 - problem.table["image"]}
    assert toy.trees_equal(before, gradient(changed))
    for module in before:
        has_gradient = any(np.any(x) for x in jax.tree.leaves(before[module]))
        assert has_gradient == (module in ("text", "text_head")), module


@pytest.mark.parametrize("order", ["stored", "by_class"])
def test_training_follows_the_order_of_a_stream(order):
    data, window = toy.make_dataset(300), 5
    config = dataclasses.replace(
        toy.make_config(), corruptions=Corruptions(order=order, window=window)
    )
    shuffled = toy.make_problem(executors.vmap(1), data, config)
    positions = corruptions.stream_positions(data, order)
    assert positions is not None
    problem = shuffled._replace(stream_positions=positions)
    rows = problem.sets.retain
    place = np.full(len(data.labels), -1)
    place[rows] = np.argsort(np.argsort(positions[rows]))

    def max_displacement(problem):
        plans = METHODS["retrain"](problem).plan
        plan = plans["rows"].ravel()[: len(rows)]
        assert sorted(plan.tolist()) == rows.tolist()
        return np.abs(place[plan] - np.arange(len(rows))).max()

    assert max_displacement(problem) < window
    assert max_displacement(shuffled) > 50
    # Row numbers of feature tables stand for rows of the data set.
    plan = problem.plan_batches(rows, 8, 3, "x", by_index=True).ravel()
    assert np.abs(place[rows[plan]] - np.arange(24)).max() < window
