"""Losses and labels of the methods from the literature, and what they unlearn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax import objectives
from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import gather_replicated, gather_rows
from ccu_jax.methods import METHODS, distillation, reference
from ccu_jax.methods.finetuning import LAYERS
from ccu_jax.models import VISUAL, Outputs
from tests import toy
from tests.distributed.test_executors import EXECUTORS


@functools.cache
def make_problem(multi_label):
    data = toy.make_dataset(multi_label=multi_label)
    return toy.make_problem(executors.vmap(1), data)


def first_batch(problem, program):
    batch = {}
    for number, (part, plan) in enumerate(sorted(program.plan.items())):
        keys = jax.random.split(jax.random.key(number), plan.shape[1])
        batch[part] = gather_rows(program.table, {"rows": plan[0]}) | {"key": keys}
    return batch


# --- losses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "multi_label", [False, pytest.param(True, marks=pytest.mark.table)]
)
def test_one_pass_of_neggrad_plus_equals_two_passes(multi_label):
    problem = make_problem(multi_label)
    config = problem.config.neggrad_plus
    program = METHODS["neggrad_plus"](problem)
    assert program.loss is not None
    task_loss = reference.make_augmented_task_loss(problem)
    chance_loss = 4 * np.log(2) if multi_label else np.log(toy.CLASSES)
    batch = first_batch(problem, program)

    def loss_of_two_passes(params):
        rows, unlearn_loss = batch["unlearn"], 0.0
        outputs = problem.model.apply(params, rows)
        for view in VISUAL:
            loss_B = objectives.cross_entropy_rows(
                getattr(outputs, view), rows["labels"], multi_label=multi_label
            )
            loss_B = jnp.minimum(loss_B, config.loss_cap * chance_loss)
            unlearn_loss += objectives.mean(loss_B, rows["has_image"])
        retain_loss = task_loss(params, batch["retain"])
        weight = config.retain_weight
        return weight * retain_loss - (1 - weight) * unlearn_loss

    def loss_of_one_pass(params):
        return program.loss(params, program.frozen, (), batch, jnp.int32(0))[0]

    # With doubled parameters the loss of some rows is capped.
    params = jax.tree.map(lambda x: 2 * x, problem.params)
    (value, gradient), (expected, expected_gradient) = (
        jax.jit(jax.value_and_grad(toy.on_one_device(loss)))(params)
        for loss in (loss_of_one_pass, loss_of_two_passes)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1)
        ),
        gradient,
        expected_gradient,
    )


class LogitTable:
    """A model whose parameters are the logits of each row."""

    def __init__(self, problem):
        rng = np.random.default_rng(0)
        size = problem.table["labels"].shape
        self.params = {"image_head": {v: rng.normal(size=size) for v in VISUAL}}

    def apply(self, params, rows, **_):
        logits = {v: x[rows["row"]] for v, x in params["image_head"].items()}
        empty = Outputs(*[jnp.zeros(0)] * len(Outputs._fields))
        return empty._replace(**logits)


@pytest.mark.parametrize("multi_label", [False, True])
def test_delete_distills_the_original_without_the_true_class(multi_label):
    problem = make_problem(multi_label)
    labels = np.asarray(problem.table["labels"])
    model: Any = LogitTable(problem)
    row = jnp.arange(len(labels))
    problem = problem._replace(
        model=model, params=model.params, table={**problem.table, "row": row}
    )
    program = METHODS["delete"](problem)
    assert program.loss is not None
    batch = first_batch(problem, program)

    def loss(params):
        return program.loss(params, program.frozen, (), batch, 0)[0]

    # The gradient of a cross-entropy at logits 0 is the uniform prediction - target.
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    gradients = jax.grad(toy.on_one_device(loss))(zeros)["image_head"]
    rows = np.asarray(batch["unlearn"]["row"])
    rows = rows[np.asarray(problem.table["has_image"])[rows]]
    unique, counts = np.unique(rows, return_counts=True)
    frequency = labels[problem.sets.retain].mean(0)
    is_true = labels[unique] > 0
    for view in VISUAL:
        gradient = len(rows) / counts[:, None] * np.asarray(gradients[view])[unique]
        original = model.params["image_head"][view][unique]
        if multi_label:
            target = 1 / 2 - toy.CLASSES / 4 * gradient
            expected = np.where(is_true, frequency, scipy.special.expit(original))
        else:
            target = 1 / toy.CLASSES - gradient
            without_true = np.where(is_true, -np.inf, original)
            expected = scipy.special.softmax(without_true, axis=1)
        np.testing.assert_allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_multidelete_takes_texts_of_next_rows_across_devices(name):
    executor = EXECUTORS[name]()
    text = np.arange(48, dtype=np.int32).reshape(16, 3)
    rows = {"text": text, "has_text": np.arange(16) % 3 > 0}

    def fn(state, _, shard):
        return state, gather_replicated(distillation._texts_of_next_rows(shard))

    _, found = executor.compile(fn)((), (), jax.tree.map(executor.shard, rows))
    for column, x in rows.items():
        np.testing.assert_array_equal(found[column], np.roll(x, -1, axis=0))


@pytest.mark.parametrize("name", ["cf_head", "cf_tail", "eu_head", "eu_tail"])
def test_last_layers_start_from_original_or_random_parameters(name, problem):
    program = METHODS[name](problem)
    trained = LAYERS[name[3:]]
    frozen = program.frozen["modules"]
    assert tuple(program.params) == trained
    assert set(frozen) == set(problem.params) - set(trained)
    for module, tree in (program.params | frozen).items():
        is_original = module in frozen or name.startswith("cf_")
        same = toy.trees_equal(tree, problem.params[module])
        assert same == is_original, module
    if name.startswith("eu_"):
        other = METHODS[name](problem._replace(seed=1)).params
        assert not any(toy.trees_equal(x, program.params[m]) for m, x in other.items())


# --- unlearning -----------------------------------------------------------------------

CONFIG = {
    "model": {"image_width": 16, "text_width": 16, "dropout": 0.0},
    "train": {"epochs": 40, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    | toy.NO_AUGMENTATION,
    "gradient_ascent": {"epochs": 5.0, "learning_rate": 1e-3},
    "neggrad_plus": {"epochs": 3.0, "retain_weight": 0.5, "learning_rate": 3e-3},
    "random_label": {"epochs": 3.0, "unlearn_weight": 1.0, "learning_rate": 2e-3},
    "contrastive_unlearning": {
        "epochs": 2.0,
        "contrast_weight": 0.5,
        "learning_rate": 2e-3,
    },
    "run": {"steps_per_call": 40},
}


@pytest.fixture(scope="module")
def memorized(tmp_path_factory):
    """A problem whose original has memorized its images, and a loop."""
    data = toy.make_memorizable_dataset(280)
    problem = toy.make_problem(
        executors.vmap(1), data, toy.make_config(**CONFIG), rule="random:0.25"
    )
    loop, folder = toy.make_loop(problem), tmp_path_factory.mktemp("original")
    outcome = loop.run(
        "original", METHODS["original"], problem, folder, toy.NullStage()
    )
    problem = problem._replace(params=problem.executor.replicate(outcome.params))
    assert true_class_probability(problem, {}, "unlearn") > 0.8
    return problem, loop


def true_class_probability(problem, params, split):
    """Returns its mean over a split, in the image view."""
    rows = getattr(problem.sets, split)
    params = {**problem.params, **params}
    logits = problem.forward.outputs(params, problem.table, rows)["image"]
    is_true = np.asarray(problem.table["labels"])[rows] > 0
    return scipy.special.softmax(logits, axis=1)[is_true].mean()


@pytest.mark.parametrize(
    "name",
    ["gradient_ascent", "neggrad_plus", "random_label", "contrastive_unlearning"],
)
def test_confidence_falls_more_on_unlearn_than_on_retain_rows(
    name, memorized, tmp_path
):
    problem, loop = memorized
    outcome = loop.run(name, METHODS[name], problem, tmp_path, toy.NullStage())
    assert outcome.diverged is None
    loss = {
        split: true_class_probability(problem, {}, split)
        - true_class_probability(problem, outcome.params, split)
        for split in ("unlearn", "retain")
    }
    assert loss["unlearn"] > 0.2
    # Gradient ascent does not use the retain set.
    assert name == "gradient_ascent" or loss["retain"] < loss["unlearn"] - 0.05
