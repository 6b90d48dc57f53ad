"""All executors make the same steps, and reject metrics that were not reduced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax import objectives
from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import HostColumn, gather_replicated
from ccu_jax.train.program import Program
from ccu_jax.train.step import init_state, make_steps_fn, static_inputs
from tests import toy
from tests.distributed.test_executors import EVERY_EXECUTOR, EXECUTORS

STEPS, BATCH, RATE = 3, 16, 0.1
SOME_EXECUTORS = pytest.mark.parametrize("name", ["pmap", "shard_map", "vmap 4"])


def make_regression(**changes) -> Any:
    """Returns weighted least squares, which `solve_by_hand` computes in NumPy."""
    rng = np.random.default_rng(0)
    table = {
        "x": rng.normal(size=(20, 3)).astype(np.float32),
        "y": rng.normal(size=20).astype(np.float32),
        "weight": (np.arange(20) % 4 != 1).astype(np.float32),
    }

    def loss(params, frozen, aux, batch, step):
        rows = batch["rows"]
        error = (rows["x"] @ params["w"] + frozen - rows["y"]) ** 2
        random = jax.vmap(jax.random.uniform)(rows["key"])
        return objectives.mean(error, rows["weight"]), {
            "random": objectives.mean(random * rows["y"], jnp.ones(len(random)))
        }

    program = Program(
        params={"w": jnp.zeros(3)},
        frozen=jnp.float32(0.5),
        loss=loss,
        optimizer=optax.sgd(RATE),
        table=table,
        plan={"rows": rng.integers(20, size=(STEPS, BATCH)).astype(np.int32)},
    )
    return program._replace(**changes)


def solve_by_hand(program, steps=STEPS):
    """Returns the parameters after some steps, in NumPy."""
    w = np.zeros(3)
    for index in program.plan["rows"][:steps]:
        x, y, weight = (np.float64(a[index]) for a in program.table.values())
        error = x @ w + 0.5 - y
        w = w - RATE * 2 * (weight * error) @ x / weight.sum()
    return w


def prepare(executor, program):
    """Returns the compiled steps and their arguments."""
    state = executor.replicate(init_state(program, jax.random.key(1)))
    static = executor.replicate(static_inputs(program))
    inputs = toy.step_inputs_of(executor, program)
    steps = executor.compile(make_steps_fn(program), donate=True)
    return steps, state, static, inputs


def run(executor, program):
    steps, *arguments = prepare(executor, program)
    return jax.device_get(steps(*arguments))


@EVERY_EXECUTOR
def test_every_executor_makes_the_same_steps_and_donates_the_state_alone(name):
    program = make_regression()
    steps, state, static, inputs = prepare(EXECUTORS[name](), program)
    outputs = steps(state, static, inputs)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(outputs))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    others = jax.tree.leaves((static, inputs, outputs, program.params))
    assert not any(x.is_deleted() for x in others)
    state, metrics = jax.device_get(outputs)
    np.testing.assert_allclose(state.params["w"], solve_by_hand(program), atol=1e-5)
    assert int(state.step) == STEPS and metrics["ran"].all()
    _, expected = run(executors.vmap(1), program)
    for key in ("loss", "gradient", "random"):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-5, err_msg=key)


@SOME_EXECUTORS
def test_loss_of_one_device_is_averaged_over_all(name):
    """Without the mean inside the gradient, shard_map's would be 8 times too large."""

    def loss(params, frozen, aux, batch, step):
        rows = batch["rows"]
        return ((rows["x"] @ params["w"] + frozen - rows["y"]) ** 2).mean(), {}

    program = make_regression(loss=loss)
    program.table["weight"][:] = 1
    state, _ = run(EXECUTORS[name](), program)
    np.testing.assert_allclose(state.params["w"], solve_by_hand(program), atol=1e-5)


@EVERY_EXECUTOR
def test_steps_on_shards_or_rows_from_the_host_equal_those_on_a_replicated_table(name):
    program, executor = make_regression(), EXECUTORS[name]()
    expected, expected_metrics = run(executor, program)
    # Padded, so that all devices have as many rows.
    padded = {
        key: np.pad(x, [(0, 4), (0, 0)][: x.ndim], constant_values=9)
        for key, x in program.table.items()
    }
    shards = executor.shard_tree(padded)
    column = HostColumn(program.table["x"], np.full(20, True))
    for fields in (
        {"table": {}, "sharded_tables": {"rows": shards}},
        {"table": {**program.table, "x": column}},
    ):
        state, metrics = run(executor, program._replace(**fields))
        np.testing.assert_array_equal(state.params["w"], expected.params["w"])
        jax.tree.map(np.testing.assert_array_equal, metrics, expected_metrics)


@SOME_EXECUTORS
def test_refresh_reads_the_shard_of_this_device_and_can_gather_all(name):
    executor = EXECUTORS[name]()
    table = np.random.default_rng(0).integers(99, size=(24, 2)).astype(np.int32)

    def refresh(params, frozen, aux, sharded_tables):
        local = sharded_tables["more"]
        assert len(local) == 24 // executor.num_devices
        return gather_replicated(local)

    program = make_regression(
        aux=jnp.zeros((24, 2), jnp.int32),
        refresh=refresh,
        sharded_tables={"more": executor.shard_tree(table)},
    )
    state, _ = run(executor, program)
    np.testing.assert_array_equal(state.aux, table)


def make_clipped_adamw(labels):
    """Returns AdamW with gradient clipping and a learning rate for each label."""

    adamw = functools.partial(optax.adamw, b2=0.98, weight_decay=0.05)
    optimizers: dict[Any, Any] = {"rest": adamw(0.05), "text": adamw(0.05 / 3)}
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition(optimizers, labels)
    )


@pytest.mark.parametrize("name", ["pmap", "vmap 2"])
def test_optimizer_of_one_vector_per_group_makes_the_same_steps(name):
    def loss(params, frozen, aux, batch, step):
        x, y = batch["rows"]["x"], batch["rows"]["y"]
        hidden = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"])
        out = hidden @ params["outer"]["w"] * params["tilt"] + params["top"]["b"].sum()
        return 30 * objectives.mean((out - y) ** 2, batch["rows"]["weight"]), {}

    rng = np.random.default_rng(4)
    params = {
        "top": {"b": rng.normal(size=(2, 1, 2))},
        "outer": {"w": rng.normal(size=4)},
        "inner": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "tilt": rng.normal(),
    }
    group = {"top": "text", "tilt": "text", "outer": "rest", "inner": "rest"}
    grouped = make_regression(
        params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params),
        loss=loss,
        group=group.get,
        optimizer=make_clipped_adamw({name: name for name in ("rest", "text")}),
        plan={"rows": rng.integers(20, size=(9, BATCH)).astype(np.int32)},
    )
    by_module = {"group": lambda module: module, "optimizer": make_clipped_adamw(group)}
    executor = EXECUTORS[name]()
    state, metrics = run(executor, grouped)
    other_state, other_metrics = run(executor, grouped._replace(**by_module))
    assert (metrics["gradient"] > 1.5).any(), "some gradients are clipped"
    norms = metrics["gradient"], other_metrics["gradient"]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert_close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(assert_close, state.params, other_state.params)
    # One vector per group and moment, not one per array.
    sizes = sorted(x.size for x in jax.tree.leaves(state.opt) if x.ndim)
    rest, text = 4 + 12 + 4, 4 + 1
    assert sizes == [text, text, rest, rest]


def test_steps_of_one_call_equal_single_steps_and_end_with_the_program():
    program, executor = make_regression(), executors.vmap(2)
    steps, state, static, inputs = prepare(executor, program)
    for step in range(STEPS):
        one_step = toy.step_inputs_of(executor, program, slice(step, step + 1))
        state, _ = steps(state, static, one_step)
    at_once, _ = run(executor, program)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), at_once)
    state, metrics = steps(state, static, inputs)  # after the last step
    assert not np.asarray(metrics["ran"]).any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), at_once)


@SOME_EXECUTORS
def test_refresh_runs_before_every_nth_step(name):
    def refresh(params, frozen, aux, sharded_tables):
        return {"count": aux["count"] + 1, "w": params["w"]}

    aux = {"count": jnp.int32(0), "w": jnp.full(3, 9.0)}
    program = make_regression(aux=aux, refresh=refresh, refresh_every=2)
    state, _ = run(EXECUTORS[name](), program)
    assert int(state.aux["count"]) == 2  # before steps 0 and 2
    np.testing.assert_allclose(state.aux["w"], solve_by_hand(program, 2), atol=1e-5)


@SOME_EXECUTORS
def test_program_that_stops_itself_makes_no_further_step(name):
    program = make_regression(
        aux=jnp.int32(0),
        refresh=lambda params, frozen, aux, sharded_tables: aux + 1,
        stop=lambda aux: aux >= 2,
    )
    state, metrics = run(EXECUTORS[name](), program)
    np.testing.assert_array_equal(metrics["ran"], [True, False, False])
    assert int(state.step) == 1
    assert int(state.aux) == 2, "no refresh after the one that stops it"
    np.testing.assert_allclose(state.params["w"], solve_by_hand(program, 1), atol=1e-5)
