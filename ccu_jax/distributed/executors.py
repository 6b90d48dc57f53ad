"""Executors: how one per-device function runs on all devices of all processes.

A per-device function is `fn(state, resident, batch) -> (state, out)`. `state` and
`resident` are the same on every device, `batch` is this device's share, and everything
returned must have been reduced over `AXIS`. Each executor runs the same function:

* `pmap`, the default. It takes device 0's word for an output that was never reduced.
* `shard_map`, which refuses such an output.
* `vmap`, which refuses it too, and needs one device only: the oracle of the tests.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ccu_jax.distributed.hosts import all_agree
from ccu_jax.distributed.moves import moved_together
from ccu_jax.errors import UserError

AXIS = "devices"


class Executor(NamedTuple):
    """How work is laid out.

    Attributes:
        name: its row in `EXECUTORS`.
        devices: number of shares that a global batch is cut into.
        run: `run(fn, donate=False)` compiles a per-device function.
        place: puts a tree on every device.
        mine: `mine(array, axis=0)` cuts the global batch along `axis` and gives the
            parts of this process's devices, the device as leading axis.
        join: makes the devices' array of what `mine` gave, or of what was read for it.
    """

    name: str
    num_devices: int
    compile: Callable[..., Callable]
    replicate: Callable[[Any], Any]
    local_shard: Callable[..., np.ndarray]
    to_global: Callable[[np.ndarray], Any]

    def shard(self, array, axis: int = 0):
        """Cuts a batch that every process has as a whole over all devices."""
        return self.to_global(self.local_shard(array, axis))

    def shard_tree(self, tree):
        """Each device's rows of a tree, in order: `[devices, rows / devices, ...]`."""
        return jax.tree.map(self.shard, tree)


def _replicated(mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())
    here = set(jax.local_devices())

    def place(tree):
        moved_together()

        def put(x):
            if isinstance(x, jax.Array) and x.sharding == everywhere:
                return x
            if isinstance(x, jax.Array) and jax.dtypes.issubdtype(
                x.dtype, jax.dtypes.prng_key
            ):
                return jax.random.wrap_key_data(put(jax.random.key_data(x)))
            if jax.process_count() == 1:
                return jax.device_put(x, everywhere)
            if isinstance(x, jax.Array) and x.sharding.device_set == here:
                if x.is_fully_replicated:  # what pmap gives: no copy is needed
                    parts = [shard.data for shard in x.addressable_shards]
                    return jax.make_array_from_single_device_arrays(
                        x.shape, everywhere, parts
                    )
            x = np.asarray(x)
            return jax.make_array_from_process_local_data(everywhere, x, x.shape)

        return jax.tree.map(put, tree)

    return place


def _split(array, axis, devices):
    """Cut `axis` into `devices` equal runs of rows and move the device to the front."""
    rows = array.shape[axis]
    if rows % devices:
        raise UserError(
            f"a batch of {rows} rows cannot be divided among {devices} devices: choose "
            f"batch sizes that are multiples of {devices}"
        )
    shape = array.shape[:axis] + (devices, rows // devices) + array.shape[axis + 1 :]
    return np.moveaxis(np.asarray(array).reshape(shape), axis, 0)


def _mesh():
    # Process by process, and with Auto axes, as pmap does: arrays of both kinds then go
    # together. On a pod, `jax.devices()` has an order of its own.
    devices = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process)
    ]
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _sharded(mesh):
    """How a batch that every process knows as a whole is cut; each puts its own rows.

    What rows hold need be read by the process alone whose devices get them.
    """
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    here = jax.local_device_count()
    first = jax.process_index() * here

    def mine(array, axis=0):
        return _split(array, axis, jax.device_count())[first : first + here]

    def join(local):
        moved_together()
        return jax.make_array_from_process_local_data(rows, local)

    return mine, join


class _Pod:
    """A pmap whose results belong to all processes, as its compiled form's do.

    Called as it is, it gives arrays of this process alone, which combine with no other.
    """

    def __init__(self, mapped, place):
        self._mapped, self._place = mapped, place
        self.lower = mapped.lower

    def __call__(self, *args):
        return self._place(self._mapped(*args))


def pmap() -> Executor:
    """One program per device, the batch's leading axis being the device."""
    mesh = _mesh()
    place = _replicated(mesh)

    def run(fn, donate=False):
        mapped = jax.pmap(
            fn,
            axis_name=AXIS,
            axis_size=jax.device_count(),  # of all processes, as are the batches
            in_axes=(None, None, 0),
            out_axes=None,
            donate_argnums=(0,) if donate else (),
        )
        return mapped if jax.process_count() == 1 else _Pod(mapped, place)

    return Executor("pmap", jax.device_count(), run, place, *_sharded(mesh))


def shard_map() -> Executor:
    """The same program through `jax.shard_map` with its checks on."""
    mesh = _mesh()

    def run(fn, donate=False):
        def inner(state, resident, batch):
            return fn(state, resident, jax.tree.map(lambda x: x[0], batch))

        mapped = jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    return Executor(
        "shard_map", jax.device_count(), run, _replicated(mesh), *_sharded(mesh)
    )


def vmap(devices: int | None = None) -> Executor:
    """As many make-believe devices as wanted on the first real one."""
    devices = devices or jax.device_count()

    def run(fn, donate=False):
        mapped = jax.vmap(fn, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None)
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    def mine(array, axis=0):
        return _split(array, axis, devices)

    return Executor("vmap", devices, run, jax.device_put, mine, jax.device_put)


EXECUTORS = {"pmap": pmap, "shard_map": shard_map, "vmap": vmap}


def fits(size: int) -> bool:
    """Whether so many bytes may stay on every device, beside all that training needs.

    All processes come to the same answer: they run the same program.
    """
    return all_agree(size <= _room())


def _room() -> float:
    """Bytes that may stay on each device of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return 0.4 * limit
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        memory = 8 << 30
    # Simulated devices share the machine's memory, and so may their processes.
    return 0.2 * memory / jax.device_count()
