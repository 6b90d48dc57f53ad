"""Tables whose columns are replicated on the devices, sharded, or on the host.

A `Table` maps names to columns with one leading row axis. Its arrays are replicated on
the devices; a `HostColumn` stays in host memory or on disk, and only the rows of the
next steps are sent. A sharded table (`Executor.shard_tree`) has arrays `[D, L, ...]`,
L rows on each of D devices. Functions marked "per-device" run inside an executor.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.executors import AXIS, Executor


class HostColumn(NamedTuple):
    """A column `[N, ...]` in host memory or on disk; invalid rows are read as zeros."""

    array: np.ndarray
    valid: np.ndarray  # bool `[N]`

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows at the given indices, `[*rows.shape, ...]`."""
        flat = np.asarray(rows).ravel()
        taken = np.asarray(self.array).take(flat, axis=0)
        if not (valid := self.valid.take(flat)).all():
            taken[~valid] = 0
        return taken.reshape(*np.shape(rows), *self.array.shape[1:])


Column = jax.Array | np.ndarray | HostColumn
Table = Mapping[str, Column]


def read_rows(column: Column, rows: np.ndarray) -> np.ndarray:
    """Reads rows of a column on the devices or the host into host memory."""
    if isinstance(column, HostColumn):
        return column.take(rows)
    if isinstance(column, jax.Array):  # only these rows leave the device
        column = column.addressable_data(0)
    return np.asarray(column[rows])


def device_columns(table: Table) -> dict[str, Any]:
    """Returns the columns of a table that are on the devices."""
    return {k: x for k, x in table.items() if not isinstance(x, HostColumn)}


def send_rows(
    executor: Executor, table: Table, rows: np.ndarray, axis: int = 0
) -> dict[str, Any]:
    """Sends each device its row indices, and these rows of the table's host columns.

    `rows` are the row indices of global batches along `axis`. Pass an empty table if
    they index a sharded table.
    """
    local = executor.local_shard(rows, axis)
    sent = {k: x.take(local) for k, x in table.items() if isinstance(x, HostColumn)}
    return {k: executor.to_global(x) for k, x in ({"rows": local} | sent).items()}


def gather_rows(columns: dict[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    """Gathers a batch from device columns and from `send_rows`; per-device."""
    from_host = {name: x for name, x in sent.items() if name != "rows"}
    return jax.tree.map(lambda x: x[sent["rows"]], columns) | from_host


def gather_replicated(tree: Any) -> Any:
    """Gathers the rows of all devices onto every device; per-device.

    Implemented as a psum of zero-padded blocks: unlike an all_gather, a psum is known
    to be replicated, so shard_map accepts the result as an output. It is exact.
    """

    def gather(x):
        size = jax.lax.axis_size(AXIS)
        # psum cannot sum booleans.
        number = x.astype(jnp.int8) if x.dtype == bool else x
        blocks = jnp.zeros((size, *x.shape), number.dtype)
        blocks = blocks.at[jax.lax.axis_index(AXIS)].set(number)
        blocks = jax.lax.psum(blocks, AXIS).astype(x.dtype)
        return blocks.reshape((-1, *x.shape[1:]))

    return jax.tree.map(gather, tree)


def gather_sharded(columns: Any, rows: jax.Array) -> Any:
    """Gathers rows `[B]` of a sharded table from the devices that own them; per-device.

    The columns are arrays `[L, ...]`; device d has the rows `d * L` to `d * L + L - 1`.
    """
    if jax.lax.axis_size(AXIS) == 1:
        return jax.tree.map(lambda x: x[rows], columns)
    all_rows = jax.lax.all_gather(rows, AXIS, tiled=True)

    def take(x):
        offset = all_rows - jax.lax.axis_index(AXIS) * len(x)
        is_local = (offset >= 0) & (offset < len(x))
        taken = x[jnp.clip(offset, 0, len(x) - 1)]
        taken = jnp.where(is_local.reshape(-1, *[1] * (x.ndim - 1)), taken, 0)
        # One device adds the row and all others add zeros, so the sum is exact.
        if x.dtype == bool:
            taken = taken.astype(jnp.int8)
        summed = jax.lax.psum_scatter(taken, AXIS, scatter_dimension=0, tiled=True)
        return summed.astype(x.dtype)

    return jax.tree.map(take, columns)
