"""Batch plans, and reading the rows of their batches."""

import numpy as np
import pytest

from ccu_jax.data.batches import iterate_batches, plan_batches, plan_single_pass
from ccu_jax.distributed.device_tables import HostColumn


def test_each_epoch_of_a_plan_is_a_permutation_that_depends_on_the_seed():
    rows = np.array([3, 5, 8, 9, 11, 40, 41])
    plans = [plan_batches(rows, batch=4, steps=7, seed=seed) for seed in (1, 1, 2)]
    plan = plans[0].reshape(4, 7)
    assert plan.dtype == np.int32
    assert all(sorted(epoch) == rows.tolist() for epoch in plan)
    assert len({tuple(epoch) for epoch in plan}) > 1
    assert (plans[0] == plans[1]).all()
    assert (plans[0] != plans[2]).any()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_plan_from_any_step_equals_tail_of_full_plan(batch, window):
    rows = np.arange(10)
    plan = plan_batches(rows, batch, steps=12, seed=7, window=window)
    for start in range(12):
        resumed = plan_batches(rows, batch, 12 - start, 7, start, window)
        np.testing.assert_array_equal(resumed, plan[start:])


def test_plan_without_rows_is_an_error_and_without_steps_is_empty():
    with pytest.raises(ValueError, match="non-empty"):
        plan_batches(np.arange(0), 4, 1, 0)
    assert plan_batches(np.arange(3), 4, 0, 0, start=5).shape == (0, 4)


@pytest.mark.parametrize("window", [1, 7, 40])
def test_window_limits_how_far_rows_move_from_their_order(window):
    rows = np.random.default_rng(3).permutation(200)
    plan = plan_batches(rows, 10, 60, seed=2, window=window).reshape(3, 200)
    place = np.argsort(rows)
    for epoch in plan:
        assert sorted(epoch) == list(range(200))
        assert np.abs(place[epoch] - np.arange(200)).max() < window
    if window == 1:
        np.testing.assert_array_equal(plan, [rows] * 3)
    else:
        assert (plan[0] != plan[1]).any()


@pytest.mark.parametrize("batch", [1, 8, 16, 67, 100])
def test_single_pass_contains_each_row_once_and_masks_the_padding(batch):
    rows = np.random.default_rng(1).permutation(67)
    plan, mask = plan_single_pass(rows, batch)
    assert plan.shape == mask.shape == (-(-67 // batch), batch)
    np.testing.assert_array_equal(plan[mask], rows)


def test_batches_hold_the_rows_of_the_plan_and_zeros_for_missing_images():
    rng, has_image = np.random.default_rng(0), np.arange(67) % 5 != 2
    image = HostColumn(rng.integers(1, 255, (67, 4, 4, 3), np.uint8), has_image)
    columns = {"image": image, "text": rng.integers(0, 9, (67, 3))}
    plan = plan_batches(np.arange(67), 8, 3, seed=0)
    for rows, batch in zip(plan, iterate_batches(columns, plan), strict=True):
        np.testing.assert_array_equal(batch["row"], rows)
        np.testing.assert_array_equal(batch["text"], columns["text"][rows])
        assert batch["image"][has_image[rows]].all()
        assert not batch["image"][~has_image[rows]].any()
    assert image.array.all()  # the column itself is not modified
