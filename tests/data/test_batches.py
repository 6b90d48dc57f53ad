"""The plan of batches, and what each host reads of it."""

import numpy as np
import pytest

from ccu_jax.data import batches as pipeline

N = 67


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    there = np.arange(N) % 5 != 2
    image = rng.integers(1, 255, (N, 4, 4, 3), np.uint8)
    return {
        "image": pipeline.OnHost(image, there),
        "text": rng.integers(0, 9, (N, 3)),
        "id": np.array([f"row {n}" for n in range(N)]),
    }


def test_every_epoch_of_the_plan_is_a_permutation():
    chosen = np.array([3, 5, 8, 9, 11, 40, 41])
    plan = pipeline.batches(chosen, batch=4, steps=7, seed=1).reshape(4, 7)
    assert plan.dtype == np.int32
    assert all(sorted(epoch) == chosen.tolist() for epoch in plan)
    assert len({tuple(epoch) for epoch in plan}) > 1


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_a_plan_resumed_at_any_step_goes_on_as_if_uninterrupted(batch, window):
    chosen = np.arange(10)
    whole = pipeline.batches(chosen, batch, steps=12, seed=7, window=window)
    for start in range(12):
        rest = pipeline.batches(chosen, batch, 12 - start, 7, start, window)
        np.testing.assert_array_equal(rest, whole[start:])


def test_the_plan_depends_on_the_seed():
    plans = [pipeline.batches(np.arange(50), 8, 5, seed) for seed in (0, 0, 1)]
    assert (plans[0] == plans[1]).all()
    assert (plans[0] != plans[2]).any()


def test_a_plan_of_no_rows_is_refused_and_one_of_no_steps_is_empty():
    with pytest.raises(ValueError, match="non-empty"):
        pipeline.batches(np.arange(0), 4, 1, 0)
    assert pipeline.batches(np.arange(3), 4, 0, 0, start=5).shape == (0, 4)


@pytest.mark.parametrize("window", [1, 7, 40])
def test_a_stream_keeps_its_order_but_for_a_window_and_each_epoch_is_whole(window):
    rows = np.random.default_rng(3).permutation(200)
    plan = pipeline.batches(rows, 10, 60, seed=2, window=window).reshape(3, 200)
    place = np.argsort(rows)
    for epoch in plan:
        assert sorted(epoch) == list(range(200))
        # No row stands where one a whole window ahead of it should have been.
        assert np.abs(place[epoch] - np.arange(200)).max() < window
    if window == 1:
        np.testing.assert_array_equal(plan, [rows] * 3)
    else:
        assert (plan[0] != plan[1]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_the_batches_of_all_hosts_together_are_those_of_one(columns, hosts):
    plan = pipeline.batches(np.arange(N), 16, 11, seed=5)
    whole = list(pipeline.feed(columns, plan))
    shares = [
        list(pipeline.feed(columns, plan, host=host, hosts=hosts))
        for host in range(hosts)
    ]
    for step in range(11):
        for name in ("row", *columns):
            together = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(together, whole[step][name])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_a_feed_resumed_by_skipping_gives_the_same_batches(columns, hosts):
    plan = pipeline.batches(np.arange(N), 16, 9, seed=5)
    whole = list(pipeline.feed(columns, plan, host=hosts - 1, hosts=hosts))
    for start in range(9):
        rest = pipeline.feed(columns, plan, host=hosts - 1, hosts=hosts, start=start)
        for mine, theirs in zip(rest, whole[start:], strict=True):
            for name in ("row", *columns):
                np.testing.assert_array_equal(mine[name], theirs[name])


def test_a_feed_holds_what_the_columns_hold_and_zeros_for_what_is_not_there(columns):
    plan = pipeline.batches(np.arange(N), 8, 3, seed=0)
    for step, batch in enumerate(pipeline.feed(columns, plan)):
        np.testing.assert_array_equal(batch["row"], plan[step])
        np.testing.assert_array_equal(batch["text"], columns["text"][plan[step]])
        there = columns["image"].there[plan[step]]
        assert batch["image"][there].all() and not batch["image"][~there].any()
    assert columns["image"].array.all()  # the source is as it was


@pytest.mark.parametrize("batch", [1, 8, 16, 67, 100])
def test_evaluation_covers_every_row_once_and_masks_what_fills_the_last_batch(batch):
    rows = np.random.default_rng(1).permutation(N)
    plan, counts = pipeline.cover(rows, batch)
    assert plan.shape == counts.shape and plan.shape[1] == batch
    assert len(plan) == -(-N // batch)
    np.testing.assert_array_equal(plan[counts], rows)
    assert counts.sum() == N


def test_batches_that_cannot_be_shared_are_refused():
    plan = pipeline.batches(np.arange(9), 6, 2, seed=0)
    for host, hosts in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="in batches of 6"):
            pipeline.share(plan, host, hosts)
