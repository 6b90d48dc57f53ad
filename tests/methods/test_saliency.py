"""Gradients and Fisher diagonals of sets of rows, and the methods that use them."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.methods import METHODS, saliency
from ccu_jax.methods.programs import visual_losses
from ccu_jax.methods.saliency import draw_wrong_labels, top_fraction_mask
from ccu_jax.train.step import flatten
from tests import toy
from tests.distributed.test_executors import EXECUTORS
from tests.toy import trees_equal

ROWS = np.array([*range(3, 40), 3, 3])  # more than one chunk, and repeated rows


@functools.cache
def row_gradients(multi_label):
    """Returns the gradient of each row's loss, computed one after the other."""
    data = toy.make_dataset(multi_label=multi_label)
    problem = toy.make_problem(executors.vmap(1), data)
    table = problem.table
    assert not np.asarray(table["has_image"])[ROWS].all()

    def gradient(row):
        rows = {name: x[row][None] for name, x in table.items()}

        def loss(params):
            outputs = problem.model.apply(params, rows)
            image, fused = visual_losses(outputs, rows["labels"], multi_label)
            return (image + fused)[0] * rows["has_image"][0]

        return jax.grad(loss)(problem.params)

    return jax.device_get(jax.jit(lambda rows: jax.lax.map(gradient, rows))(ROWS))


assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, multi_label",
    [(n, False) for n in ("pmap", "shard_map", "vmap 1", "vmap 2", "vmap 8")]
    + [("vmap 1", True)],
)
def test_gradient_and_fisher_equal_those_of_single_rows(name, multi_label):
    gradients = row_gradients(multi_label)
    data = toy.make_dataset(multi_label=multi_label)
    problem = toy.make_problem(EXECUTORS[name](), data)
    if name == "vmap 2":
        image = np.asarray(problem.table["image"])
        on_host = HostColumn(image, np.ones(len(image), bool))
        problem = problem._replace(table={**problem.table, "image": on_host})
    mean = jax.tree.map(lambda x: x.mean(0), gradients)
    assert_close(saliency.mean_gradient(problem, ROWS), mean)
    fisher = jax.tree.map(lambda x: (x * x).mean(0), gradients)
    assert_close(saliency.fisher_diagonal(problem, ROWS), fisher)


@pytest.mark.parametrize("multi_label", [False, True])
def test_wrong_labels_replace_those_of_the_unlearn_set(multi_label):
    data = toy.make_dataset(420, multi_label=multi_label)
    problem = toy.make_problem(executors.vmap(1), data)
    problem = problem._replace(method="random_label")
    wrong, sets = draw_wrong_labels(problem), problem.sets
    true, rows = np.asarray(problem.table["labels"]), sets.unlearn
    assert wrong.shape == true.shape and wrong.dtype == true.dtype
    others = np.setdiff1d(np.arange(len(true)), rows)
    np.testing.assert_array_equal(wrong[others], true[others])
    assert (draw_wrong_labels(problem._replace(seed=1)) != wrong).any()
    if multi_label:
        retained = {tuple(x) for x in true[sets.retain]}
        assert {tuple(x) for x in wrong[rows]} <= retained
        assert (wrong[rows] != true[rows]).any()
    else:
        np.testing.assert_array_equal(wrong.sum(1), 1)
        pairs = zip(true[rows].argmax(1), wrong[rows].argmax(1), strict=True)
        classes = range(toy.CLASSES)
        assert set(pairs) == {(a, b) for a in classes for b in classes if a != b}


def test_top_fraction_is_by_size_and_without_zeros():
    tree = {"a": jnp.array([[3.0, -4.0], [0.1, 0.0]]), "b": jnp.array([-2.0, 1.0])}
    mask = top_fraction_mask(tree, 0.5)
    assert mask["a"].tolist() == [[1, 1], [0, 0]] and mask["b"].tolist() == [1, 0]
    assert top_fraction_mask(tree, 1.0)["a"].tolist() == [[1, 1], [1, 0]]


def test_salun_trains_parameters_with_the_largest_gradient(tmp_path, run_method):
    outcome, problem = run_method("salun", tmp_path)
    gradient = saliency.mean_gradient(problem, problem.sets.unlearn)
    sizes, before, after = (
        np.asarray(flatten(lambda module: "all", tree)[0]["all"])
        for tree in (gradient, problem.params, outcome.params)
    )
    is_moved = (before != after)[np.argsort(-np.abs(sizes), kind="stable")]
    count = round(problem.method_config.saliency_fraction * len(is_moved))
    # Except for ties at the threshold.
    assert not is_moved[count + 2 :].any()
    assert is_moved[: count - 2].mean() > 0.95


def test_ssd_dampens_by_both_fisher_diagonals(tmp_path, run_method):
    outcome, problem = run_method("ssd", tmp_path)
    sets, config = problem.sets, problem.method_config
    rows = np.concatenate([sets.retain, sets.unlearn])
    fisher_u = saliency.fisher_diagonal(problem, sets.unlearn)
    fisher_all = saliency.fisher_diagonal(problem, rows)

    def dampen(x, f_u, f_all):
        x, f_u, f_all = (np.asarray(a, np.float64) for a in (x, f_u, f_all))
        factor = np.minimum(config.lambda_ * f_all / np.maximum(f_u, 1e-30), 1)
        return np.where(f_u > config.alpha * f_all, x * factor, x)

    expected = jax.tree.map(dampen, problem.params, fisher_u, fisher_all)
    assert_close(outcome.params, expected)
    fewer = problem._replace(config=toy.make_config(ssd={"max_rows": 9}))
    few, again, other = (
        METHODS["ssd"](fewer._replace(seed=seed)).params for seed in (0, 0, 1)
    )
    assert trees_equal(few, again)
    assert not trees_equal(few, other) and not trees_equal(few, outcome.params)


def test_sfron_with_more_repair_steps_shares_an_executable(tmp_path, run_method):
    traces = collections.Counter()
    for repair_steps in (2, 3):
        changes = {"sfron": {"repair_steps": repair_steps}}
        outcome, problem = run_method("sfron", tmp_path, changes=changes, traces=traces)
    assert traces["sfron"] == 1
    expected, _ = run_method(
        "sfron", tmp_path, changes=changes, loop=toy.make_loop(problem)
    )
    assert trees_equal(outcome.params, expected.params)
