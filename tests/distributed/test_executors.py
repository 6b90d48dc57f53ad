"""All executors shard and replicate alike, and reject outputs that were not reduced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.distributed.executors import AXIS
from ccu_jax.errors import UserError

EXECUTORS = {
    "pmap": executors.pmap,
    "shard_map": executors.shard_map,
    **{f"vmap {n}": lambda n=n: executors.vmap(n) for n in (1, 2, 4, 8)},
}
EVERY_EXECUTOR = pytest.mark.parametrize("name", EXECUTORS)


@pytest.mark.parametrize("name", ["shard_map", "vmap 2", "vmap 8"])
@pytest.mark.parametrize("where", ["state", "metrics"])
def test_output_that_was_not_reduced_is_rejected(name, where):
    def fn(state, static_inputs, batch):
        local = (batch * static_inputs).sum()
        if where == "state":
            return local, jax.lax.psum(local, AXIS)
        return state, local

    executor = EXECUTORS[name]()
    one = executor.replicate(jnp.float32(1))
    with pytest.raises(ValueError, match="out_axes|out_specs"):
        executor.compile(fn)(one, one, executor.shard(np.arange(16.0)))


@EVERY_EXECUTOR
def test_shards_are_in_the_order_of_the_devices_and_of_equal_size(name):
    executor = EXECUTORS[name]()
    num_devices = executor.num_devices
    shards = np.asarray(executor.shard(np.arange(32).reshape(2, 16), 1))
    assert shards.shape == (num_devices, 2, 16 // num_devices)
    np.testing.assert_array_equal(shards[:, 0].ravel(), np.arange(16))
    if num_devices > 1:
        for array, axis in ((np.zeros(13), 0), (np.zeros((8, 7)), 1)):
            with pytest.raises(UserError, match=f"{num_devices} devices"):
                executor.shard(array, axis)


@EVERY_EXECUTOR
def test_random_keys_can_be_replicated(name):
    tree = EXECUTORS[name]().replicate({"key": jax.random.key(3), "x": np.arange(3)})
    expected = jax.random.key_data(jax.random.key(3))
    np.testing.assert_array_equal(jax.random.key_data(tree["key"]), expected)


def test_executor_has_the_name_of_its_key_and_uses_all_devices():
    for name, make in executors.EXECUTORS.items():
        assert make()[:2] == (name, 8)


def test_arrays_fit_on_the_devices_if_there_is_free_memory(monkeypatch):
    assert executors.fits_on_devices(1) and not executors.fits_on_devices(1 << 50)
    monkeypatch.setattr(executors, "_estimate_free_bytes", lambda: 1000.0)
    assert executors.fits_on_devices(1000) and not executors.fits_on_devices(1001)
