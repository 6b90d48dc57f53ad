"""Batch plans: which row stands at which place of which training step.

A plan is a pure function of the rows, the seed and the global batch size, so neither
the number of hosts nor a resume changes what is trained on.
"""

import numpy as np


def plan_batches(
    rows: np.ndarray,
    batch: int,
    steps: int,
    seed: int,
    start: int = 0,
    window: int | None = None,
) -> np.ndarray:
    """Plans shuffled batches for a number of steps.

    The plan is a slice of an endless sequence of epochs, each a permutation of the
    rows. No row is dropped: a batch may contain the end of one epoch and the start of
    the next.

    Args:
        rows: int [M], the rows to draw from, M > 0; M may be smaller than `batch`.
        batch: global batch size, over all devices and hosts.
        steps: number of steps to plan.
        seed: a non-negative integer.
        start: first step of the plan; a plan from step s equals the tail of a plan
            from step 0.
        window: None shuffles freely. Otherwise rows keep the order of `rows`, except
            that each may move by fewer than `window` places.

    Returns:
        int32 [steps, batch], row numbers of the steps `start` to `start + steps - 1`.

    Raises:
        ValueError: `rows` is empty or not a vector.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be a non-empty vector, not {rows.shape}")
    first, last = start * batch, (start + steps) * batch
    epochs = range(first // len(rows), -(-last // len(rows)))
    permutations = [
        _permute(rows, np.random.default_rng([seed, epoch]), window) for epoch in epochs
    ]
    flat = np.concatenate([*permutations, rows[:0]])
    offset = epochs.start * len(rows)
    return flat[first - offset : last - offset].reshape(steps, batch)


def _permute(
    rows: np.ndarray, rng: np.random.Generator, window: int | None
) -> np.ndarray:
    if window is None:
        return rng.permutation(rows)
    # Sorting by place + uniform[0, window) never swaps rows `window` or more apart.
    keys = np.arange(len(rows)) + rng.uniform(0, max(window, 1), len(rows))
    return rows[np.argsort(keys, kind="stable")]


def plan_single_pass(rows: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Plans batches that contain every row once, in order, for evaluation.

    Args:
        rows: int [M].
        batch: global batch size.

    Returns:
        int32 [steps, batch], the plan, where the last batch is padded with row 0; and
        bool [steps, batch], False at the padding.
    """
    rows = np.asarray(rows, np.int32)
    steps = -(-len(rows) // batch)
    plan = np.pad(rows, (0, steps * batch - len(rows))).reshape(steps, batch)
    mask = np.arange(steps * batch).reshape(steps, batch) < len(rows)
    return plan, mask
