"""Training: its rates, its order of rows, and what the visual reference learns from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax.config.schema import Corruptions, Train
from ccu_jax.data import corruptions
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.device_tables import gather_rows
from ccu_jax.distributed.executors import AXIS
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, optimizers, reference
from ccu_jax.models import TEXT
from tests import toy
from tests.toy import NullStage, make_loop, on_one_device, problem_and_loop, trees_equal


def test_the_visual_reference_never_learns_from_a_forgotten_picture():
    """Its loss and gradient stay when these pictures change, and its texts count."""
    problem, _ = problem_and_loop()
    still = {"learning_rate": 1e-2, "word_dropout": 0.0}
    problem = problem._replace(config=toy.make_config(train=still))
    index = jnp.asarray(problem.sets.unlearn)
    program = METHODS["retrain_visual"](problem)
    keys = jax.random.split(jax.random.key(0), len(index))

    def gradient(table):
        batch = {"rows": gather_rows(table, {"rows": index}) | {"key": keys}}

        def loss(params):
            return jax.lax.pmean(program.loss(params, (), (), batch, 0)[0], AXIS)

        return jax.lax.pmean(jax.grad(loss)(program.params), AXIS)

    gradient = jax.jit(on_one_device(gradient))
    changed = {**program.table, "image": 255 - program.table["image"]}
    before, after = gradient(program.table), gradient(changed)
    assert trees_equal(before, after)
    for part in before:
        moved = any(np.any(x) for x in jax.tree.leaves(before[part]))
        assert moved == (part in ("text", "text_head")), part


@pytest.mark.parametrize("rising", [0, 3])
def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine(rising):
    config = Train(weight_decay=0.0, text_lr_scale=0.5)
    params = {
        optimizers.parameter_group(part): jnp.ones(2) for part in ("image_head", "text")
    }
    assert {
        part
        for part in problem_and_loop()[0].params
        if optimizers.parameter_group(part) == "text"
    } == {*TEXT}
    optimise = optimizers.make_optimizer(config)
    numbers = optimizers.optimizer_inputs(0.1, 12, config, rising / 12)
    state = optimise.init(params)
    step = jax.jit(functools.partial(optimise.update, inputs=numbers))
    expected = optax.warmup_cosine_decay_schedule(
        0.0 if rising else 0.1, 0.1, rising, 12
    )
    for count in range(12):
        updates, state = step(params, state, params)
        # Adam's answer to a gradient that never changes is its sign.
        np.testing.assert_allclose(updates["rest"], -expected(count), atol=1e-6)
        np.testing.assert_allclose(updates["text"], -expected(count) / 2, atol=1e-6)
    # Behind the last step, where room was made for a look, nothing moves.
    for _ in range(2):
        updates, state = step(params, state, params)
        assert not any(x.any() for x in updates.values())


@pytest.mark.parametrize("order", ["stored", "by_class"])
def test_training_takes_rows_in_the_order_of_the_conditions(order):
    data = toy.make_dataset(300)
    settings = toy.make_config()
    settings = dataclasses.replace(
        settings, corruptions=Corruptions(order=order, window=5)
    )
    plain = toy.make_problem(parallel.vmap(1), data, settings)
    problem = plain._replace(stream_positions=corruptions.stream_positions(data, order))
    rows = problem.sets.retain
    place = np.argsort(np.argsort(problem.stream_positions[rows]))
    stands = dict(zip(rows.tolist(), place.tolist(), strict=True))
    plan = reference.retrain(problem).plan["rows"].ravel()[: len(rows)]
    late = np.array([stands[row] for row in plan.tolist()]) - np.arange(len(rows))
    assert np.abs(late).max() < 5
    assert sorted(plan.tolist()) == rows.tolist()
    shuffled = reference.retrain(plain).plan["rows"].ravel()[: len(rows)]
    assert (
        np.abs(np.array([stands[r] for r in shuffled]) - np.arange(len(rows))).max()
        > 50
    )
    # Methods on cached features go by the rows that these stand for.
    cached = np.arange(len(rows))
    plan = problem.plan_batches(cached, 8, 3, "x", dataset_rows=rows)
    assert np.abs(place[plan.ravel()] - np.arange(24)).max() < 5


@pytest.mark.parametrize(
    "multi_label",
    [
        pytest.param(False, marks=pytest.mark.slow, id="single"),
        pytest.param(True, marks=pytest.mark.table, id="multi"),
    ],
)
def test_a_trained_model_says_nearly_the_same_in_bfloat16(multi_label, tmp_path):
    """Logits change by 2 % of their spread in the mean, and none by more than 15 %."""
    data = toy.make_dataset(280, whole=True, multi_label=multi_label)
    train = {"epochs": 20, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    sizes = {"image_width": 16, "text_width": 16}
    settings = toy.make_config(
        model=sizes, train=train | toy.NO_AUGMENTATION, run={"steps_per_call": 100}
    )
    executor = parallel.vmap(1)
    problem = toy.make_problem(executor, data, settings)
    loop = make_loop(problem)
    method = METHODS["original"]
    params = loop.run(
        "original", method, problem, tmp_path / "none", NullStage()
    ).params
    half = toy.build_model(toy.make_config(model={**sizes, "dtype": "bfloat16"}))
    full, near = (
        predictions.predict_all_splits(
            forward, params, problem.table, data, problem.sets
        )
        for forward in (problem.forward, Forward(half, executor, 64))
    )
    for view, logits in full.logits.items():
        change = np.abs(near.logits[view] - logits)
        assert 0 < change.mean() < 0.02 * logits.std(), view
        assert change.max() < 0.15 * logits.std(), view
    score = "micro_f1" if multi_label else "accuracy"
    for name, views in predictions.compute_scores(full).items():
        for view, scores in views.items():
            found = predictions.compute_scores(near)[name][view]
            assert abs(found[score] - scores[score]) < 0.03, (name, view)
    assert predictions.compute_scores(full)["retain"]["fused"][score] > 0.9, (
        "it has learned"
    )
    one, other = predictions.attack_auc(full), predictions.attack_auc(near)
    assert all(abs(one[view] - other[view]) < 0.02 for view in one)
