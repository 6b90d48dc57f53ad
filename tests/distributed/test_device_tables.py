"""Tables give the same rows to every device, wherever the columns are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed.device_tables import (
    HostColumn,
    gather_replicated,
    gather_sharded,
    read_rows,
)
from tests.distributed.test_executors import EVERY_EXECUTOR, EXECUTORS


def make_columns(rows=24):
    """Returns columns of every type, with values that a sum could change."""
    rng = np.random.default_rng(0)
    x = {
        "float32": rng.normal(size=(rows, 3)).astype(np.float32),
        "bfloat16": rng.normal(size=(rows, 2, 3)).astype(jnp.bfloat16),
        "bool": rng.random(rows) < 0.5,
        "bools": rng.random((rows, 4)) < 0.5,
        "int32": rng.integers(-(2**31), 2**31, (rows, 2)).astype(np.int32),
        "uint8": rng.integers(0, 256, (rows, 2, 2, 3)).astype(np.uint8),
    }
    x["float32"][::5, 1], x["float32"][2, 2] = np.inf, np.nan
    x["int32"][:2] = [[2**31 - 1, -(2**31)], [-1, 0]]
    x["bools"][:3] = [[True] * 4, [False] * 4, [True, False, True, False]]
    return x


@EVERY_EXECUTOR
@pytest.mark.parametrize(
    "rows",
    [
        np.arange(24),
        np.random.default_rng(1).integers(24, size=40),
        np.full(16, 5),
        np.tile([23, 21, 22], 8),  # of the last device
    ],
    ids=["all rows", "random rows", "one row", "rows of one device"],
)
def test_requested_rows_of_any_device_are_gathered_onto_every_device(name, rows):
    executor, table = EXECUTORS[name](), make_columns()

    def fn(state, _, batch):
        return state, gather_replicated(gather_sharded(batch["table"], batch["rows"]))

    shards = executor.shard(rows.astype(np.int32))
    batch = {"table": executor.shard_tree(table), "rows": shards}
    _, gathered = executor.compile(fn)((), (), batch)
    assert set(gathered) == set(table)
    for key, x in table.items():
        assert gathered[key].dtype == x.dtype, key
        np.testing.assert_array_equal(np.asarray(gathered[key]), x[rows], err_msg=key)


@EVERY_EXECUTOR
@pytest.mark.parametrize("where", ["host", "devices"])
def test_sharded_table_is_in_order_and_each_device_holds_its_shard_only(name, where):
    executor, table = EXECUTORS[name](), make_columns()
    source = table if where == "host" else executor.replicate(table)
    size = 24 // executor.num_devices
    for key, x in executor.shard_tree(source).items():
        assert x.shape == (executor.num_devices, size, *table[key].shape[1:])
        merged = np.asarray(x).reshape(table[key].shape)
        np.testing.assert_array_equal(merged, table[key], err_msg=key)
        if "vmap" not in name:
            shapes = [shard.data.shape for shard in x.addressable_shards]
            assert shapes == [(1, *x.shape[1:])] * executor.num_devices


def test_rows_are_read_from_any_place():
    x, rows = make_columns()["int32"], np.array([3, 23, 3])
    replicated = EXECUTORS["pmap"]().replicate(x)
    for column in (x, replicated, HostColumn(x, np.ones(len(x), bool))):
        read = read_rows(column, rows)
        assert isinstance(read, np.ndarray) and not isinstance(read, jax.Array)
        np.testing.assert_array_equal(read, x[rows])
