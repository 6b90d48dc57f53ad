"""Gradients of whole sets, and masks, dampening and slow weights."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax import objectives
from ccu_jax.config.schema import Train
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.methods import METHODS, optimizers
from ccu_jax.methods import finetuning as baselines
from ccu_jax.methods import saliency as curvature
from ccu_jax.models import VISUAL
from ccu_jax.train.step import flatten
from tests import toy
from tests.distributed.test_executors import EXECUTORS
from tests.toy import make_loop, run_method, trees_equal

ROWS = np.array([*range(3, 40), 3, 3])  # more than one pass, and a row thrice


@functools.cache
def by_rows(multi_label):
    """Gradients of the loss of each row by itself, one after the other."""
    data = toy.make_dataset(multi_label=multi_label)
    problem = toy.make_problem(parallel.vmap(1), data)
    table = problem.table

    def gradient(row):
        rows = {name: x[row][None] for name, x in table.items()}

        def loss(params):
            out = problem.model.apply(params, rows)
            each = (
                objectives.cross_entropy_rows(
                    getattr(out, view), rows["labels"], multi_label=multi_label
                )
                for view in VISUAL
            )
            return sum(each)[0] * rows["has_image"][0]

        return jax.grad(loss)(problem.params)

    assert not np.asarray(table["has_image"])[ROWS].all(), "some have no picture"
    # A loop, not a vmap, for that is what is tested.
    return jax.device_get(jax.jit(lambda rows: jax.lax.map(gradient, rows))(ROWS))


def close(found, expected):
    for path, x in jax.tree_util.tree_leaves_with_path(expected):
        of = found
        for key in path:
            of = of[key.key]
        np.testing.assert_allclose(of, x, rtol=2e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(
    "name, multi_label",
    [(n, False) for n in ("pmap", "shard_map", "vmap 1", "vmap 2", "vmap 8")]
    + [("vmap 1", True)],
)
def test_gradient_and_fisher_are_those_of_the_rows_one_by_one(name, multi_label):
    each = by_rows(multi_label)
    mean = jax.tree.map(lambda x: x.mean(0), each)
    square = jax.tree.map(lambda x: (x * x).mean(0), each)
    executor = EXECUTORS[name]()
    data = toy.make_dataset(multi_label=multi_label)
    problem = toy.make_problem(executor, data)
    if name == "vmap 2":
        image = np.asarray(problem.table["image"])
        on_host = HostColumn(image, np.ones(len(image), bool))
        problem = problem._replace(table={**problem.table, "image": on_host})
    close(curvature.mean_gradient(problem, ROWS), mean)
    close(curvature.fisher_diagonal(problem, ROWS), square)


# --- masks ----------------------------------------------------------------------------


def masked_run(push, steps=6):
    """Steps of training's optimizer behind a mask; parameters after each of them."""
    rng = np.random.default_rng(0)
    params = {g: jnp.asarray(rng.normal(size=9), jnp.float32) for g in ("rest", "text")}
    mask = {g: jnp.asarray(rng.random(9) < 0.5, jnp.float32) for g in params}
    config = Train(weight_decay=0.5)
    numbers = optimizers.optimizer_inputs(0.1, 2 * steps, config) | {"mask": mask}
    numbers["is_ascent"] = jnp.asarray([True, False] * steps)
    optimizer = optax.chain(
        optimizers.make_optimizer(config),
        optimizers.mask_updates(only_ascent_steps=push),
    )
    state, seen = optimizer.init(params), [params]
    for _ in range(steps):
        gradient = {g: jnp.asarray(rng.normal(size=9)) for g in params}
        updates, state = optimizer.update(gradient, state, params, inputs=numbers)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return mask, seen


def test_weights_behind_a_mask_do_not_move_to_the_bit():
    """Neither by gradients, nor by momentum, nor by weight decay."""
    mask, seen = masked_run(push=False)
    for group, open_ in mask.items():
        first, last = np.asarray(seen[0][group]), np.asarray(seen[-1][group])
        shut = np.asarray(open_) == 0
        assert shut.any() and not shut.all()
        np.testing.assert_array_equal(first[shut], last[shut])
        assert (first[~shut] != last[~shut]).all()


def test_a_mask_of_pushes_leaves_the_other_steps_alone():
    mask, seen = masked_run(push=True)
    for place, (before, after) in enumerate(zip(seen[:-1], seen[1:], strict=True)):
        for group, open_ in mask.items():
            moved = np.asarray(before[group]) != np.asarray(after[group])
            expected = np.asarray(open_) > 0 if place % 2 == 0 else True
            assert (moved == expected).all(), (place, group)


def test_shut_weights_do_not_follow_a_push_by_its_momentum():
    """As in sfron: after a push come steps in which nothing pulls at anything."""
    params = {g: jnp.ones(6) for g in ("rest", "text")}
    mask = {g: jnp.asarray([0.0, 1, 0, 1, 0, 1]) for g in params}
    config = Train(weight_decay=0.0)
    numbers = optimizers.optimizer_inputs(0.1, 20, config) | {"mask": mask}
    numbers["is_ascent"] = jnp.asarray([True, *[False] * 9])
    masked = functools.partial(optimizers.mask_updates, only_ascent_steps=True)
    optimizer = optax.chain(masked(), optimizers.make_optimizer(config), masked())
    state = optimizer.init(params)
    for step in range(6):
        pull = {g: jnp.full(6, 1.0 if step == 0 else 0.0) for g in params}
        updates, state = optimizer.update(pull, state, params, inputs=numbers)
        params = optax.apply_updates(params, updates)
    for group in params:
        shut = np.asarray(mask[group]) == 0
        np.testing.assert_array_equal(np.asarray(params[group])[shut], 1.0)
        assert (np.asarray(params[group])[~shut] < 1).all()


def test_entries_that_are_zero_are_none_of_the_largest():
    tree = {"a": jnp.array([0.0, 0.0, 0.0, 5.0])}
    assert baselines.top_fraction_mask(tree, 0.75)["a"].tolist() == [0, 0, 0, 1]


def test_the_largest_are_so_many_by_size_whatever_their_sign():
    tree = {"a": jnp.array([[3.0, -4.0], [0.1, 0.0]]), "b": jnp.array([-2.0, 1.0])}
    found = baselines.top_fraction_mask(tree, 0.5)
    np.testing.assert_array_equal(found["a"], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(found["b"], [1, 0])
    assert baselines.top_fraction_mask(tree, 1.0)["a"].tolist() == [[1, 1], [1, 0]]


def test_salun_moves_the_weights_that_the_unlearn_set_pulls_at_most(tmp_path):
    outcome, problem = run_method("salun", tmp_path)
    slope = curvature.mean_gradient(problem, problem.sets.unlearn)
    sizes = flatten(lambda part: "all", slope)[0]["all"]
    before, after = (
        np.asarray(flatten(lambda part: "all", params)[0]["all"])
        for params in (problem.params, outcome.params)
    )
    order = np.argsort(-np.abs(sizes), kind="stable")
    moved = (before != after)[order]
    share = problem.method_config.saliency_fraction
    # But those that stand exactly at the bound.
    assert not moved[round(share * len(moved)) + 2 :].any()
    assert moved[: round(share * len(moved)) - 2].mean() > 0.95


# --- selective synaptic dampening -----------------------------------------------------


def test_weights_that_matter_more_to_the_unlearn_set_are_dampened():
    params = {"a": jnp.array([2.0, -3.0]), "b": jnp.array([5.0, 7.0])}
    of_unlearn = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([0.0, 6.0])}
    of_all = {"a": jnp.array([0.1, 0.5]), "b": jnp.array([0.0, 0.2])}
    found = curvature._dampen(params, of_unlearn, of_all, 10.0, 2.0)
    # 4 > 10 * 0.1: times 2 * 0.1 / 4; 1 < 5; nothing matters; 6 > 2: times 0.4 / 6.
    np.testing.assert_allclose(found["a"], [2 * 0.05, -3], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [5, 7 * 0.4 / 6], rtol=1e-6)
    # Nothing ever grows.
    found = curvature._dampen(params, of_unlearn, of_all, 1.0, 100.0)
    np.testing.assert_array_equal(found["a"], params["a"])


def test_ssd_is_the_dampening_by_both_fishers(tmp_path):
    outcome, problem = run_method("ssd", tmp_path)
    sets, section = problem.sets, problem.method_config
    every = np.concatenate([sets.retain, sets.unlearn])
    u, d = (curvature.fisher_diagonal(problem, rows) for rows in (sets.unlearn, every))

    def expected(x, u, d):
        x, u, d = (np.asarray(a, np.float64) for a in (x, u, d))
        factor = np.minimum(section.lambda_ * d / np.maximum(u, 1e-30), 1)
        return np.where(u > section.alpha * d, x * factor, x)

    close(outcome.params, jax.tree.map(expected, problem.params, u, d))
    fewer = problem._replace(config=toy.make_config(ssd={"max_rows": 9}))
    few, again, other = (
        METHODS["ssd"](fewer._replace(seed=seed)).params for seed in (0, 0, 1)
    )
    assert trees_equal(few, again)
    assert not trees_equal(few, other) and not trees_equal(few, outcome.params)


# --- slow weights ---------------------------------------------------------------------


def slow_run(period, slow=0.5, steps=7):
    """A weight that climbs by 1 each step, and slow weights behind it."""
    optimizer = optax.chain(optax.sgd(-1.0), optimizers.lookahead())
    numbers = {"slow_fraction": jnp.float32(slow), "period": jnp.int32(period)}
    params = {"all": jnp.zeros(2)}
    state, seen = optimizer.init(params), []
    for _ in range(steps):
        one = {"all": jnp.ones(2)}
        updates, state = optimizer.update(one, state, params, inputs=numbers)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["all"][1]))
    return seen


def test_lookahead_synchronizes_at_the_end_of_each_period():
    assert slow_run(3) == [1, 2, 1.5, 2.5, 3.5, 3, 4]
    assert slow_run(3, slow=1.0) == [1, 2, 3, 4, 5, 6, 7]
    assert slow_run(1, slow=0.25, steps=4) == [0.25, 0.5, 0.75, 1]


def test_more_repairs_are_no_other_program(tmp_path):
    """Nor must a loop that has compiled one number of them take it for another."""
    traces = collections.Counter()
    for repair in (2, 3):
        changes = {"sfron": {"repair_steps": repair}}
        outcome, problem = run_method("sfron", tmp_path, changes=changes, traces=traces)
    assert traces["sfron"] == 1
    alone, _ = run_method("sfron", tmp_path, changes=changes, loop=make_loop(problem))
    assert trees_equal(outcome.params, alone.params)
