"""Batch plans, which list the rows of every training step, and readers of these rows.

A plan is a pure function of the rows, the seed and the global batch size, so neither
the number of hosts nor a resume changes what is trained on.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ccu_jax.data.preparation.tfds_builders import import_tensorflow
from ccu_jax.distributed.device_tables import HostColumn


def plan_batches(
    rows: np.ndarray,
    batch: int,
    steps: int,
    seed: int,
    start: int = 0,
    window: int | None = None,
) -> np.ndarray:
    """Plans the shuffled batches of training steps.

    The plan is a slice of an endless sequence of epochs, each a permutation of the
    rows. No row is dropped: a batch may contain the end of one epoch and the start of
    the next.

    Args:
        rows: int [M], the rows to draw from, M > 0; M may be smaller than `batch`.
        batch: global batch size, over all devices and hosts.
        steps: number of steps to plan.
        seed: a non-negative integer.
        start: first step; a plan from step s equals the tail of a plan from step 0.
        window: None shuffles all rows. Otherwise rows are in the order of `rows`,
            except that each may move by fewer than `window` positions.

    Returns:
        int32 [steps, batch], the row numbers of steps `start` to `start + steps - 1`.

    Raises:
        ValueError: `rows` is empty or not a vector.
    """
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows must be a non-empty vector, got shape {rows.shape}")
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
    """Returns the rows in the order of one epoch; see `plan_batches`."""
    if window is None:
        return rng.permutation(rows)
    # Sorting by place + uniform[0, window) never swaps rows `window` or more apart.
    keys = np.arange(len(rows)) + rng.uniform(0, max(window, 1), len(rows))
    return rows[np.argsort(keys, kind="stable")]


def plan_single_pass(rows: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Plans evaluation batches that contain every row once, in order.

    Args:
        rows: int [M].
        batch: global batch size.

    Returns:
        The plan, int32 [steps, batch], its last batch padded with row 0, and a mask,
        bool [steps, batch], that is False at the padding.
    """
    rows = np.asarray(rows, np.int32)
    steps = -(-len(rows) // batch)
    plan = np.pad(rows, (0, steps * batch - len(rows))).reshape(steps, batch)
    mask = np.arange(steps * batch).reshape(steps, batch) < len(rows)
    return plan, mask


def iterate_batches(
    columns: Mapping[str, np.ndarray | HostColumn], plan: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """Reads the batches of a plan into memory, one at a time.

    Args:
        columns: arrays [N, ...] by name, memory-mapped or not.
        plan: int [steps, batch], from `plan_batches` or `plan_single_pass`.

    Yields:
        A batch: "row", the row numbers int [batch], and these rows of each column.
    """
    readers = {name: _make_row_reader(column) for name, column in columns.items()}
    for rows in plan:
        indices = rows.astype(np.intp)  # once, or each column would convert them
        yield {"row": rows} | {name: read(indices) for name, read in readers.items()}


def _make_row_reader(
    column: np.ndarray | HostColumn,
) -> Callable[[np.ndarray], np.ndarray]:
    if isinstance(column, HostColumn):
        if not column.valid.all():
            return column.take
        column = column.array
    # np.memmap adds a constant cost to every gather; a plain array view does not.
    return functools.partial(np.asarray(column).take, axis=0)


def jpeg_dataset(paths: Sequence[pathlib.Path], size: int) -> Any:
    """Returns a tf.data pipeline that decodes JPEG files in every epoch.

    The benchmarks use it as the baseline that reads unprepared files.

    Args:
        paths: the JPEG files.
        size: S, side of the square in pixels.

    Returns:
        A `tf.data.Dataset` of batches uint8 [64, S, S, 3].
    """
    tf, _ = import_tensorflow()

    def load_image(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        image = tf.image.resize_with_pad(image, size, size)
        return tf.cast(image, tf.uint8)

    files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    # A fixed number of threads: tf.data.AUTOTUNE starts with few.
    images = files.map(load_image, num_parallel_calls=os.cpu_count() or 1)
    return images.batch(64).prefetch(1)
