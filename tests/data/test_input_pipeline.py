"""Reading the batches of a plan on one or several hosts."""

import numpy as np
import pytest

from ccu_jax.data.batches import plan_batches
from ccu_jax.data.input_pipeline import iterate_batches, shard_plan
from ccu_jax.distributed.device_tables import HostColumn

N = 67


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    has_image = np.arange(N) % 5 != 2
    return {
        "image": HostColumn(rng.integers(1, 255, (N, 4, 4, 3), np.uint8), has_image),
        "text": rng.integers(0, 9, (N, 3)),
        "id": np.array([f"row {n}" for n in range(N)]),
    }


def test_batches_hold_the_rows_of_the_plan_and_zeros_for_missing_images(columns):
    plan = plan_batches(np.arange(N), 8, 3, seed=0)
    for step, batch in enumerate(iterate_batches(columns, plan)):
        np.testing.assert_array_equal(batch["row"], plan[step])
        np.testing.assert_array_equal(batch["text"], columns["text"][plan[step]])
        has_image = columns["image"].valid[plan[step]]
        assert batch["image"][has_image].all()
        assert not batch["image"][~has_image].any()
    assert columns["image"].array.all()  # the column itself is not modified


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_shards_of_all_hosts_concatenate_to_the_global_batch(columns, num_hosts):
    plan = plan_batches(np.arange(N), 16, 11, seed=5)
    expected = list(iterate_batches(columns, plan))
    shards = [
        list(iterate_batches(columns, plan, host=host, num_hosts=num_hosts))
        for host in range(num_hosts)
    ]
    for step in range(11):
        for name in ("row", *columns):
            batch = np.concatenate([shard[step][name] for shard in shards])
            np.testing.assert_array_equal(batch, expected[step][name])


@pytest.mark.parametrize("num_hosts", [1, 8])
def test_resuming_at_a_step_gives_the_remaining_batches(columns, num_hosts):
    plan = plan_batches(np.arange(N), 16, 9, seed=5)
    host = {"host": num_hosts - 1, "num_hosts": num_hosts}
    expected = list(iterate_batches(columns, plan, **host))
    for start in range(9):
        resumed = iterate_batches(columns, plan, **host, start=start)
        for batch, full in zip(resumed, expected[start:], strict=True):
            for name in ("row", *columns):
                np.testing.assert_array_equal(batch[name], full[name])


@pytest.mark.parametrize("host, num_hosts", [(0, 4), (2, 2), (-1, 2)])
def test_batch_that_cannot_be_sharded_is_an_error(host, num_hosts):
    plan = plan_batches(np.arange(9), 6, 2, seed=0)
    with pytest.raises(ValueError, match="batch 6 has no shard"):
        shard_plan(plan, host, num_hosts)
