"""Every executor takes the same step, and refuses what would be silently wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax import errors, objectives
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed import hosts as processes
from ccu_jax.distributed.device_tables import (
    HostColumn,
    gather_replicated,
    take_sharded,
)
from ccu_jax.distributed.executors import AXIS
from ccu_jax.errors import UserError
from ccu_jax.train.program import Program
from ccu_jax.train.step import init_state, make_steps, static_inputs
from tests import toy

STEPS, BATCH, RATE = 3, 16, 0.1
EXECUTORS = {
    "pmap": parallel.pmap,
    "shard_map": parallel.shard_map,
    **{f"vmap {n}": lambda n=n: parallel.vmap(n) for n in (1, 2, 4, 8)},
}
ALL = pytest.mark.parametrize("name", EXECUTORS)


def regression(**changes):
    """Least squares of weighted rows: small enough to be followed by hand."""
    rng = np.random.default_rng(0)
    table = {
        "x": rng.normal(size=(20, 3)).astype(np.float32),
        "y": rng.normal(size=20).astype(np.float32),
        "weight": (np.arange(20) % 4 != 1).astype(np.float32),
    }

    def loss(params, frozen, aux, batch, step):
        rows = batch["rows"]
        error = (rows["x"] @ params["w"] + frozen - rows["y"]) ** 2
        draw = jax.vmap(jax.random.uniform)(rows["key"])
        return objectives.mean(error, rows["weight"]), {
            "draw": objectives.mean(draw * rows["y"], jnp.ones(len(draw)))
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


def by_hand(program):
    """The parameters after all steps, in NumPy."""
    w = np.zeros(3)
    for index in program.plan["rows"]:
        x, y, weight = (
            np.float64(program.table[k][index]) for k in ("x", "y", "weight")
        )
        error = x @ w + 0.5 - y
        w = w - RATE * 2 * (weight * error) @ x / weight.sum()
    return w


def prepare(executor, program):
    """Compiled steps, and their arguments."""
    state = executor.replicate(init_state(program, jax.random.key(1)))
    rest = executor.replicate(static_inputs(program))
    share = toy.step_inputs_of(executor, program)
    return executor.compile(make_steps(program), donate=True), state, rest, share


def run(executor, program):
    steps, *arguments = prepare(executor, program)
    return jax.device_get(steps(*arguments))


@ALL
def test_every_executor_takes_the_same_step(name):
    program = regression()
    state, metrics = run(EXECUTORS[name](), program)
    np.testing.assert_allclose(state.params["w"], by_hand(program), atol=1e-5)
    assert int(state.step) == STEPS and metrics["ran"].all()
    oracle, expected = run(parallel.vmap(1), program)
    np.testing.assert_allclose(state.params["w"], oracle.params["w"], atol=1e-5)
    for key in ("loss", "gradient", "draw"):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-5, err_msg=key)


@ALL
def test_a_loss_of_this_device_alone_is_averaged_over_all(name):
    """Without the mean inside the gradient, shard_map would be 8 times too large."""

    def loss(params, frozen, aux, batch, step):
        rows = batch["rows"]
        return ((rows["x"] @ params["w"] + frozen - rows["y"]) ** 2).mean(), {}

    program = regression(loss=loss)
    program.table["weight"][:] = 1
    state, _ = run(EXECUTORS[name](), program)
    np.testing.assert_allclose(state.params["w"], by_hand(program), atol=1e-5)


@ALL
def test_everything_that_comes_out_is_the_same_on_all_devices(name):
    executor = EXECUTORS[name]()
    steps, *arguments = prepare(executor, regression())
    for x in jax.tree.leaves(steps(*arguments)):
        assert x.is_fully_replicated


@ALL
def test_the_state_is_donated_and_the_program_keeps_its_own(name):
    program = regression()
    executor = EXECUTORS[name]()
    steps, state, rest, share = prepare(executor, program)
    after, _ = steps(state, rest, share)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((rest, share, after)))
    np.testing.assert_array_equal(program.params["w"], np.zeros(3))


@pytest.mark.parametrize("name", ["shard_map", "vmap 2", "vmap 8"])
@pytest.mark.parametrize("where", ["state", "metrics"])
def test_an_output_that_was_never_reduced_is_refused(name, where):
    def fn(state, resident, batch):
        mine = (batch * resident).sum()
        if where == "state":
            return mine, jax.lax.psum(mine, AXIS)
        return state, mine

    executor = EXECUTORS[name]()
    compiled = executor.compile(fn)
    one = executor.replicate(jnp.float32(1))
    with pytest.raises(ValueError):
        compiled(one, one, executor.shard(np.arange(16.0)))


@pytest.mark.parametrize("name", ["shard_map", "vmap 8"])
def test_a_method_whose_metric_was_not_reduced_is_refused(name):
    def loss(params, frozen, aux, batch, step):
        total = objectives.mean((batch["rows"]["x"] @ params["w"]) ** 2, jnp.ones(2))
        return total, {"local": batch["rows"]["y"].sum()}

    steps, *arguments = prepare(EXECUTORS[name](), regression(loss=loss))
    with pytest.raises((ValueError, TypeError)):
        steps(*arguments)


@ALL
def test_a_batch_that_devices_do_not_divide_is_refused(name):
    executor = EXECUTORS[name]()
    if executor.num_devices == 1:
        executor.shard(np.zeros((2, 7)), 1)
        return
    for array, axis in ((np.zeros(13), 0), (np.zeros((8, 7)), 1)):
        with pytest.raises(UserError, match=f"{executor.num_devices} devices"):
            executor.shard(array, axis)


@ALL
def test_the_batch_is_cut_in_the_order_of_the_devices(name):
    executor = EXECUTORS[name]()
    cut = np.asarray(executor.shard(np.arange(32).reshape(2, 16), 1))
    assert cut.shape == (executor.num_devices, 2, 16 // executor.num_devices)
    np.testing.assert_array_equal(np.concatenate(list(cut), axis=1)[0], np.arange(16))


@ALL
def test_random_keys_can_be_placed(name):
    placed = EXECUTORS[name]().replicate({"key": jax.random.key(3), "x": np.arange(3)})
    expected = jax.random.key_data(jax.random.key(3))
    np.testing.assert_array_equal(jax.random.key_data(placed["key"]), expected)


def test_the_table_of_executors_makes_those_of_its_names():
    assert set(parallel.EXECUTORS) == {"pmap", "shard_map", "vmap"}
    for name, make in parallel.EXECUTORS.items():
        executor = make()
        assert executor.name == name and executor.num_devices == jax.device_count() == 8
    assert processes.is_primary()


# --- tables that are cut over the devices ---------------------------------------------


def columns(rows=24):
    """Columns of every kind that a table may have, with what is hard to add up."""
    rng = np.random.default_rng(0)
    x = {
        "single": rng.normal(size=(rows, 3)).astype(np.float32),
        "half": rng.normal(size=(rows, 2, 3)).astype(jnp.bfloat16),
        "truth": rng.random(rows) < 0.5,
        "truths": rng.random((rows, 4)) < 0.5,
        "whole": rng.integers(-(2**31), 2**31, (rows, 2)).astype(np.int32),
        "bytes": rng.integers(0, 256, (rows, 2, 2, 3)).astype(np.uint8),
    }
    x["single"][::5, 1], x["single"][2, 2] = np.inf, np.nan
    x["whole"][:2] = [[2**31 - 1, -(2**31)], [-1, 0]]
    x["truths"][:3] = [[True] * 4, [False] * 4, [True, False, True, False]]
    return x


def assert_the_rows(found, table, rows):
    assert set(found) == set(table)
    for name, x in table.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), x[rows], err_msg=name)


@ALL
def test_every_device_learns_all_rows_in_order(name):
    executor, table = EXECUTORS[name](), columns()
    compiled = executor.compile(lambda state, _, rows: (state, gather_replicated(rows)))
    _, found = compiled((), (), executor.shard_tree(table))
    assert_the_rows(found, table, np.arange(24))


@ALL
@pytest.mark.parametrize("wanted", ["any", "one row", "those of the last device"])
def test_each_device_gets_the_rows_that_it_asks_for_wherever_they_lie(name, wanted):
    executor, table = EXECUTORS[name](), columns()
    rows = {
        "any": np.random.default_rng(1).integers(24, size=40),
        "one row": np.full(16, 5),
        "those of the last device": np.tile([23, 21, 22], 8),
    }[wanted].astype(np.int32)

    def fn(state, _, batch):
        return state, gather_replicated(take_sharded(batch["part"], batch["rows"]))

    batch = {"part": executor.shard_tree(table), "rows": executor.shard(rows)}
    _, found = executor.compile(fn)((), (), batch)
    assert_the_rows(found, table, rows)


@ALL
@pytest.mark.parametrize("where", ["host", "devices"])
def test_a_table_is_cut_in_order_and_no_device_holds_more_than_its_share(name, where):
    executor, table = EXECUTORS[name](), columns()
    given = table if where == "host" else executor.replicate(table)
    for key, x in executor.shard_tree(given).items():
        assert x.shape == (
            executor.num_devices,
            24 // executor.num_devices,
            *given[key].shape[1:],
        )
        rows = np.asarray(x).reshape(given[key].shape)
        np.testing.assert_array_equal(rows, table[key], err_msg=key)
        if "vmap" not in name:
            shards = [shard.data.shape for shard in x.addressable_shards]
            assert shards == [(1, *x.shape[1:])] * executor.num_devices


@ALL
def test_steps_on_a_cut_table_are_those_on_a_whole_one(name):
    whole = regression()
    table = {
        k: np.pad(x, [(0, 4)] + [(0, 0)] * (x.ndim - 1), constant_values=9)
        for k, x in whole.table.items()
    }
    executor = EXECUTORS[name]()
    cut = whole._replace(table={}, sharded_tables={"rows": executor.shard_tree(table)})
    (one, told), (other, same) = run(executor, whole), run(executor, cut)
    np.testing.assert_allclose(other.params["w"], by_hand(whole), atol=1e-5)
    np.testing.assert_array_equal(one.params["w"], other.params["w"])
    for key in told:
        np.testing.assert_array_equal(told[key], same[key], err_msg=key)


@pytest.mark.parametrize("name", ["pmap", "shard_map", "vmap 4"])
def test_a_refresh_sees_the_rows_of_this_device_and_learns_those_of_all(name):
    executor, table = EXECUTORS[name](), columns()

    def refresh(params, frozen, aux, parts):
        mine = parts["more"]["whole"]
        assert len(mine) == 24 // executor.num_devices
        return gather_replicated(mine)

    program = regression(aux=jnp.zeros((24, 2), jnp.int32), refresh=refresh)
    program = program._replace(sharded_tables={"more": executor.shard_tree(table)})
    state, _ = run(executor, program)
    np.testing.assert_array_equal(state.aux, table["whole"])


# --- the optimizer's vectors ----------------------------------------------------------


def two_groups(rate):
    """Clipping, then Adam with weight decay, each group at a rate of its own."""

    def adamw(rate):
        return optax.chain(
            optax.scale_by_adam(b2=0.98),
            optax.add_decayed_weights(0.05),
            optax.scale_by_learning_rate(rate),
        )

    return {"rest": adamw(rate), "text": adamw(rate / 3)}


@pytest.mark.parametrize("name", ["pmap", "vmap 2"])
def test_an_optimiser_of_vectors_takes_the_steps_of_one_of_trees(name):
    def branch(part):
        return "text" if part.startswith("t") else "rest"

    def loss(params, frozen, aux, batch, step):
        x, y = batch["rows"]["x"], batch["rows"]["y"]
        hidden = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"])
        said = hidden @ params["outer"]["w"] * params["tilt"] + params["top"]["b"].sum()
        return 30 * objectives.mean((said - y) ** 2, batch["rows"]["weight"]), {}

    rng = np.random.default_rng(4)
    params = {
        "top": {"b": rng.normal(size=(2, 1, 2))},
        "outer": {"w": rng.normal(size=4)},
        "inner": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "tilt": rng.normal(),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    plan = rng.integers(20, size=(9, BATCH)).astype(np.int32)
    groups = two_groups(0.05)
    program = regression(
        params=params,
        loss=loss,
        group=branch,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(groups, {group: group for group in groups}),
        ),
        plan={"rows": plan},
    )
    state, metrics = run(EXECUTORS[name](), program)
    assert (metrics["gradient"] > 1.5).any(), "something is to be clipped"

    labels = {part: branch(part) for part in params}
    trees = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(groups, labels))
    table = {name: jnp.asarray(x) for name, x in program.table.items()}

    @jax.jit
    def step(params, opt, index):
        batch = {"rows": {name: x[index] for name, x in table.items()}}

        def total(params):
            return jax.vmap(
                lambda _: loss(params, (), (), batch, 0)[0], axis_name=AXIS
            )(jnp.zeros(1))[0]

        value, gradient = jax.value_and_grad(total)(params)
        updates, opt = trees.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, optax.tree.norm(gradient)

    opt, norms = trees.init(params), []
    for index in plan:
        params, opt, norm = step(params, opt, index)
        norms.append(norm)
    np.testing.assert_allclose(metrics["gradient"], norms, rtol=1e-4)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    for found, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    # Of each group one vector, and not a moment for each array.
    sizes = sorted(x.size for x in jax.tree.leaves(state.opt) if x.ndim)
    rest, text = 4 + 12 + 4, 4 + 1
    assert sizes == [text, text, rest, rest]


# --- the scan of steps ----------------------------------------------------------------


def test_steps_after_the_end_change_nothing():
    program = regression()
    executor = parallel.vmap(2)
    steps, state, rest, share = prepare(executor, program)
    state, _ = steps(state, rest, share)
    before = jax.device_get(state)
    state, metrics = steps(state, rest, share)
    assert not np.asarray(metrics["ran"]).any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_steps_in_one_scan_are_steps_one_by_one():
    program = regression()
    executor = parallel.vmap(2)
    steps, state, rest, _ = prepare(executor, program)
    for step in range(STEPS):
        share = toy.step_inputs_of(executor, program, slice(step, step + 1))
        state, _ = steps(state, rest, share)
    together, _ = run(executor, program)
    np.testing.assert_array_equal(state.params["w"], together.params["w"])


@pytest.mark.parametrize("name", ["pmap", "shard_map", "vmap 4"])
def test_what_is_carried_along_is_refreshed_when_it_is_due(name):
    def refresh(params, frozen, aux, parts):
        return {"seen": aux["seen"] + 1, "w": params["w"]}

    program = regression(
        aux={"seen": jnp.int32(0), "w": jnp.full(3, 9.0)},
        refresh=refresh,
        refresh_every=2,
    )
    state, _ = run(EXECUTORS[name](), program)
    assert int(state.aux["seen"]) == 2  # before steps 0 and 2
    first_two = program._replace(plan={"rows": program.plan["rows"][:2]})
    np.testing.assert_allclose(state.aux["w"], by_hand(first_two), atol=1e-5)


@pytest.mark.parametrize("name", ["pmap", "shard_map", "vmap 4"])
def test_a_program_stops_itself_for_good(name):
    program = regression(
        aux=jnp.int32(0),
        refresh=lambda params, frozen, aux, parts: aux + 1,
        stop=lambda aux: aux >= 2,
    )
    state, metrics = run(EXECUTORS[name](), program)
    np.testing.assert_array_equal(metrics["ran"], [True, False, False])
    assert int(state.step) == 1
    first = program._replace(plan={"rows": program.plan["rows"][:1]})
    np.testing.assert_allclose(state.params["w"], by_hand(first), atol=1e-5)


@pytest.mark.parametrize("name", ["pmap", "shard_map", "vmap 4"])
def test_rows_that_stay_on_the_host_take_the_same_steps(name):
    program = regression()
    column, *_ = program.table
    stored = np.asarray(program.table[column])
    on_host = HostColumn(stored, np.full(len(stored), True))
    table = {**program.table, column: on_host}
    executor = EXECUTORS[name]()
    one, _ = run(executor, program)
    other, _ = run(executor, program._replace(table=table))
    np.testing.assert_array_equal(one.params["w"], other.params["w"])


def test_pictures_stay_on_the_devices_where_there_is_room(monkeypatch):
    monkeypatch.setattr(parallel, "_room", lambda: 1000.0)
    assert parallel.fits(1000) and not parallel.fits(1001)
    monkeypatch.undo()
    assert parallel.fits(1) and not parallel.fits(1 << 50)


def test_what_the_first_process_sees_is_waited_for_by_the_others(tmp_path, monkeypatch):
    there, looks = tmp_path / "there", []

    def look():
        looks.append(None)
        return len(looks) > 3

    assert not processes.wait_until_visible(there)
    there.touch()
    assert processes.wait_until_visible(there)
    assert not processes.wait_until_visible(there, look)
    monkeypatch.setattr(
        processes, "broadcast_from_primary", lambda mine: np.ones_like(mine)
    )
    assert processes.wait_until_visible(there, look)
    monkeypatch.setattr(processes, "_SOON_S", 0.3)
    with pytest.raises(errors.PeerLost, match="absent, which process 0 sees, has not"):
        processes.wait_until_visible(tmp_path / "absent")


def test_who_never_comes_is_told_from_who_cannot_be_joined(monkeypatch):
    def fails(**hosts):
        raise RuntimeError("std::bad_cast")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    hosts = {"num_processes": 3}
    with pytest.raises(errors.PeerLost, match="cannot join the other hosts: std"):
        processes.join_hosts(hosts)
    clock = iter([0.0, 301.0])  # of a job that is begun while another one ends
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    with pytest.raises(errors.PeerLost, match="not all of the 3 .* within 301 s"):
        processes.join_hosts(hosts)
