"""What the reference learns from, the order of rows, and training in bfloat16."""

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
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
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
    table_rows = np.arange(len(rows))
    plan = problem.plan_batches(table_rows, 8, 3, "x", dataset_rows=rows).ravel()
    assert np.abs(place[rows[plan]] - np.arange(24)).max() < window


@pytest.mark.parametrize(
    "multi_label",
    [
        pytest.param(False, marks=pytest.mark.slow, id="single"),
        pytest.param(True, marks=pytest.mark.table, id="multi"),
    ],
)
def test_trained_model_gives_similar_logits_in_bfloat16(multi_label, tmp_path):
    data = toy.make_dataset(280, has_both=True, multi_label=multi_label)
    train = {"epochs": 20, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    sizes = {"image_width": 16, "text_width": 16}
    config = toy.make_config(
        model=sizes, train=train | toy.NO_AUGMENTATION, run={"steps_per_call": 100}
    )
    executor = executors.vmap(1)
    problem = toy.make_problem(executor, data, config)
    outcome = toy.make_loop(problem).run(
        "original", METHODS["original"], problem, tmp_path, toy.NullStage()
    )
    half = toy.build_model(toy.make_config(model={**sizes, "dtype": "bfloat16"}))
    full, near = (
        predictions.predict_all_splits(
            forward, outcome.params, problem.table, data, problem.sets
        )
        for forward in (problem.forward, Forward(half, executor, 64))
    )
    for view, logits in full.logits.items():
        change = np.abs(near.logits[view] - logits)
        assert 0 < change.mean() < 0.02 * logits.std(), view
        assert change.max() < 0.15 * logits.std(), view
    score = "micro_f1" if multi_label else "accuracy"
    expected, found = map(predictions.compute_scores, (full, near))
    for split, views in expected.items():
        for view, scores in views.items():
            difference = found[split][view][score] - scores[score]
            assert abs(difference) < 0.03, (split, view)
    assert expected["retain"]["fused"][score] > 0.9
    one, other = predictions.attack_auc(full), predictions.attack_auc(near)
    for view, auc in one.items():
        assert other[view] == pytest.approx(auc, abs=0.02), view
