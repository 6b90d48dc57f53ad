"""Which rows stand in which batch, and how a batch comes from the disk.

Everything is a function of the seed and the global batch: how many hosts there are, and
where a run was resumed, changes nothing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np


class OnHost(NamedTuple):
    """A column that stays on the host, memory-mapped, and is gathered batch by batch.

    `array` `[N, ...]`; `there` bool `[N]`: other rows are read as zeros.
    """

    array: np.ndarray
    there: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows `[*rows.shape, ...]` of these numbers."""
        flat = np.asarray(rows).ravel()
        taken = np.asarray(self.array).take(flat, axis=0)
        if not (there := self.there.take(flat)).all():
            taken[~there] = 0
        return taken.reshape(*np.shape(rows), *self.array.shape[1:])


def batches(
    rows: np.ndarray,
    batch: int,
    steps: int,
    seed: int,
    start: int = 0,
    window: int | None = None,
) -> np.ndarray:
    """The plan: which row stands at which place of which step.

    It is cut from an endless row of permutations, one for each epoch, so every row
    comes once an epoch and no row is dropped; a batch may straddle two epochs. Each
    entry depends on `rows`, `batch`, `seed`, and its step only: resuming at a step
    gives what an uninterrupted run would have had, on any number of hosts.

    Args:
        rows: int [M], the rows to draw from, M > 0; may be fewer than `batch`.
        batch: Rows in one step, over all devices and hosts.
        steps: Number of steps to plan.
        seed: Any integer >= 0.
        start: First step of the plan.
        window: None for a permutation without any order; else rows come as in `rows`,
            each at most so many places early or late.

    Returns:
        int32 [steps, batch], the plan of the steps `start` to `start + steps - 1`.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be a non-empty vector, not {rows.shape}")
    first, last = start * batch, (start + steps) * batch
    epochs = range(first // len(rows), -(-last // len(rows)))
    drawn = [_epoch(rows, np.random.default_rng([seed, e]), window) for e in epochs]
    flat = np.concatenate([*drawn, rows[:0]])
    skipped = epochs.start * len(rows)
    return flat[first - skipped : last - skipped].reshape(steps, batch)


def _epoch(rows, rng: np.random.Generator, window: int | None) -> np.ndarray:
    if window is None:
        return rng.permutation(rows)
    # Nobody overtakes one who stands `window` places or more ahead.
    late = np.arange(len(rows)) + rng.uniform(0, max(window, 1), len(rows))
    return rows[np.argsort(late, kind="stable")]


def cover(rows: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches that hold every row once, in order; the last is filled up and masked.

    Returns:
        The plan int32 [steps, batch], and bool [steps, batch]: which places count.
    """
    rows = np.asarray(rows, np.int32)
    steps = -(-len(rows) // batch)
    plan = np.pad(rows, (0, steps * batch - len(rows))).reshape(steps, batch)
    mask = np.arange(steps * batch).reshape(steps, batch) < len(rows)
    return plan, mask


def share(plan: np.ndarray, host: int, hosts: int) -> np.ndarray:
    """One host's equal part `[steps, batch / hosts]` of each global batch.

    Raises:
        ValueError: the batch cannot be divided among the hosts.
    """
    if plan.shape[1] % hosts or not 0 <= host < hosts:
        raise ValueError(f"no share {host} of {hosts} in batches of {plan.shape[1]}")
    each = plan.shape[1] // hosts
    return plan[:, host * each : (host + 1) * each]


def feed(
    columns: Mapping[str, np.ndarray | OnHost],
    plan: np.ndarray,
    *,
    host: int = 0,
    hosts: int = 1,
    start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a plan from step `start` on, as one host gets them.

    Args:
        columns: arrays `[N, ...]`, memory-mapped or not.
        plan: int [steps, batch], from `batches` or `cover`.
        host: which share of each batch, of `hosts`.
        hosts: number of shares.
        start: steps that are passed over.

    Yields:
        `row` int [batch / hosts], and the rows of each column.
    """
    takes = [(name, _take(column)) for name, column in columns.items()]
    for rows in share(plan, host, hosts)[start:]:
        places = rows.astype(np.intp)  # once; else each column would do it
        batch = {"row": rows}
        for name, take in takes:
            batch[name] = take(places)
        yield batch


def _take(column: np.ndarray | OnHost) -> Callable[[np.ndarray], np.ndarray]:
    """What gathers rows of a column, at little more than the cost of the copy."""
    if isinstance(column, OnHost):
        if not column.there.all():
            return column.take
        column = column.array
    # Without the class of memory maps, which makes small gathers dearer.
    return functools.partial(np.asarray(column).take, axis=0)
