"""Executors, which run a per-device function on all devices of all processes.

A per-device function is `fn(state, static_inputs, batch) -> (state, out)`. `state` and
`static_inputs` are replicated, `batch` is the device's shard, and all returned arrays
must be reduced over `AXIS`. Each executor runs the same function:

* `pmap`, the default. It does not detect an output that was not reduced, and returns
  device 0's value.
* `shard_map`, which rejects such an output.
* `vmap`, which rejects it as well and simulates any number of devices on one: the
  reference in the tests.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ccu_jax.distributed import preemption
from ccu_jax.distributed.hosts import all_agree
from ccu_jax.errors import UserError

AXIS = "devices"


class Executor(NamedTuple):
    """Runs per-device functions and transfers arrays to the devices.

    Attributes:
        name: its key in `EXECUTORS`.
        num_devices: number of shards of a global batch.
        compile: `compile(fn, donate=False)` returns a per-device function as a jitted
            function on all devices; `donate` donates the state's buffers.
        replicate: copies a pytree to every device.
        local_shard: `local_shard(array, axis=0)` returns the shards of this process's
            devices, `[local devices, ...]`, of a global batch in host memory.
        to_global: turns the local shards of all processes into one array on devices.
    """

    name: str
    num_devices: int
    compile: Callable[..., Any]
    replicate: Callable[[Any], Any]
    local_shard: Callable[..., np.ndarray]
    to_global: Callable[[np.ndarray], jax.Array]

    def shard(self, array: Any, axis: int = 0) -> jax.Array:
        """Shards one axis of a global array in host memory: `[devices, ...]`."""
        return self.to_global(self.local_shard(array, axis))

    def shard_tree(self, tree: Any) -> Any:
        """Shards the rows of a pytree in order: `[devices, rows / devices, ...]`."""
        return jax.tree.map(self.shard, tree)


def pmap() -> Executor:
    """Returns the executor that uses `jax.pmap`: one program per device."""
    replicate, *sharding = _make_transfers(_make_mesh())

    def compile(fn, donate=False):
        mapped = jax.pmap(
            fn,
            axis_name=AXIS,
            axis_size=jax.device_count(),  # of all processes, like the batches
            in_axes=(None, None, 0),
            out_axes=None,
            donate_argnums=(0,) if donate else (),
        )
        return mapped if jax.process_count() == 1 else _GlobalPmap(mapped, replicate)

    return Executor("pmap", jax.device_count(), compile, replicate, *sharding)


def shard_map() -> Executor:
    """Returns the executor that uses `jax.shard_map` with its replication checks."""
    mesh = _make_mesh()

    def compile(fn, donate=False):
        def one_device(state, static_inputs, batch):
            return fn(state, static_inputs, jax.tree.map(lambda x: x[0], batch))

        mapped = jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    num_devices = jax.device_count()
    return Executor("shard_map", num_devices, compile, *_make_transfers(mesh))


def vmap(num_devices: int | None = None) -> Executor:
    """Returns the executor that simulates devices with `jax.vmap` on one device."""
    count = num_devices or jax.device_count()

    def compile(fn, donate=False):
        mapped = jax.vmap(fn, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None)
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    def local_shard(array, axis=0):
        return _split_into_shards(array, axis, count)

    return Executor("vmap", count, compile, jax.device_put, local_shard, jax.device_put)


EXECUTORS = {"pmap": pmap, "shard_map": shard_map, "vmap": vmap}


def _make_mesh() -> Mesh:
    # Ordered by process and with Auto axes, like pmap, so that arrays of both can be
    # combined. On a TPU pod `jax.devices()` has another order.
    processes = map(jax.local_devices, range(jax.process_count()))
    devices = list(itertools.chain.from_iterable(processes))
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _make_transfers(mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """Returns `replicate`, `local_shard` and `to_global` of an executor."""
    replicated = NamedSharding(mesh, PartitionSpec())
    local_devices = set(jax.local_devices())

    def put(x):
        is_array = isinstance(x, jax.Array)
        if is_array and x.sharding == replicated:
            return x
        if is_array and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        if jax.process_count() == 1:
            return jax.device_put(x, replicated)
        is_local = is_array and x.sharding.device_set == local_devices
        if is_local and x.is_fully_replicated:  # outputs of pmap need no copy
            copies = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, replicated, copies)
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(replicated, x, x.shape)

    def replicate(tree):
        preemption.sync_point()
        return jax.tree.map(put, tree)

    num_local = jax.local_device_count()
    first = jax.process_index() * num_local

    def local_shard(array, axis=0):
        return _split_into_shards(array, axis, jax.device_count())[
            first : first + num_local
        ]

    sharded = NamedSharding(mesh, PartitionSpec(AXIS))

    def to_global(local):
        preemption.sync_point()
        return jax.make_array_from_process_local_data(sharded, local)

    return replicate, local_shard, to_global


def _split_into_shards(array: Any, axis: int, count: int) -> np.ndarray:
    """Splits an axis into `count` equal shards and puts the shard axis first."""
    rows = array.shape[axis]
    if rows % count:
        raise UserError(
            f"a batch of {rows} rows cannot be divided among {count} devices; choose "
            f"batch sizes that are multiples of {count}"
        )
    shape = (*array.shape[:axis], count, rows // count, *array.shape[axis + 1 :])
    return np.moveaxis(np.asarray(array).reshape(shape), axis, 0)


class _GlobalPmap:
    """A pmap that returns global arrays when called, as its AOT-compiled form does."""

    def __init__(self, mapped, replicate):
        self._mapped, self._replicate = mapped, replicate
        self.lower = mapped.lower

    def __call__(self, *args):
        return self._replicate(self._mapped(*args))


def fits_on_devices(num_bytes: int) -> bool:
    """Returns whether `num_bytes` fit on every device next to the training state."""
    return all_agree(num_bytes <= _estimate_free_bytes())


def _estimate_free_bytes() -> float:
    """Estimates the memory of one device that the training state leaves free."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return 0.4 * limit
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # unknown on some systems
        memory = 8 << 30
    # Simulated devices share the machine's memory, and so may their processes.
    return 0.2 * memory / jax.device_count()
