"""Losses of the methods from the literature, and what they unlearn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax import objectives
from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import gather_replicated, gather_rows
from ccu_jax.methods import METHODS, distillation, programs, reference
from ccu_jax.models import VISUAL
from tests import toy
from tests.distributed.test_executors import EXECUTORS


def make_problem(multi_label):
    data = toy.make_dataset(multi_label=multi_label)
    return toy.make_problem(executors.vmap(1), data)


def first_batch(program):
    """Returns the batch of the first step, by part."""
    batch = {}
    for part, plan in program.plan.items():
        keys = jax.random.split(jax.random.key(len(batch)), plan.shape[1])
        shards = program.sharded_tables.get(part)
        table = program.table if shards is None else toy.merge_shards(shards)
        batch[part] = gather_rows(table, {"rows": plan[0]}) | {"key": keys}
    return batch


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
    batch = first_batch(program)

    def loss_of_two_passes(params):
        rows, unlearn_loss = batch["unlearn"], 0.0
        outputs = problem.model.apply(params, rows)
        for loss_B in programs.visual_losses(outputs, rows["labels"], multi_label):
            loss_B = jnp.minimum(loss_B, config.loss_cap * chance_loss)
            unlearn_loss += objectives.mean(loss_B, rows["has_image"])
        retain_loss = task_loss(params, batch["retain"])
        weight = config.retain_weight
        return weight * retain_loss - (1 - weight) * unlearn_loss

    def loss_of_one_pass(params):
        return program.loss(params, program.frozen, (), batch, jnp.int32(0))[0]

    # With doubled parameters the loss of some rows is capped.
    params = jax.tree.map(lambda x: 2 * x, problem.params)
    found, expected = (
        jax.jit(jax.value_and_grad(toy.on_one_device(loss)))(params)
        for loss in (loss_of_one_pass, loss_of_two_passes)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1)
        ),
        found,
        expected,
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_delete_distills_the_original_without_the_true_class(multi_label):
    problem = make_problem(multi_label)
    program = METHODS["delete"](problem)
    batch, rows = first_batch(program), program.plan["unlearn"][0]
    params = jax.tree.map(lambda x: 1.5 * x, problem.params)
    found = toy.on_one_device(
        lambda params: program.loss(params, program.frozen, (), batch, 0)[0]
    )(params)
    labels, has_image = (
        np.asarray(problem.table[name])[rows] for name in ("labels", "has_image")
    )
    frequency = np.asarray(problem.table["labels"])[problem.sets.retain].mean(0)
    teacher, student = (
        problem.forward.compute_outputs(x, problem.table, rows)
        for x in (problem.params, params)
    )
    expected = 0.0
    for view in VISUAL:
        if multi_label:
            p = np.where(labels > 0, frequency, scipy.special.expit(teacher[view]))
            q = scipy.special.expit(student[view])
            divergence = scipy.special.rel_entr(p, q)
            divergence += scipy.special.rel_entr(1 - p, 1 - q)
            divergence = objectives.MULTI_LABEL_SCALE * divergence.mean(1)
        else:
            without_true = np.where(labels > 0, -np.inf, teacher[view])
            p = scipy.special.softmax(without_true, axis=1)
            q = scipy.special.softmax(student[view], axis=1)
            divergence = scipy.special.rel_entr(p, q).sum(1)
        expected += divergence[has_image].mean()
    assert float(found) == pytest.approx(expected, rel=1e-4)


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
    logits = problem.forward.compute_outputs(params, problem.table, rows)["image"]
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
