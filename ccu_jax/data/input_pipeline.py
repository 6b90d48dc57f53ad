"""The input pipeline: batches of memory-mapped columns, as one host reads them."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ccu_jax.data.preparation.tfds_builders import import_tensorflow
from ccu_jax.distributed.device_tables import HostColumn


def iterate_batches(
    columns: Mapping[str, np.ndarray | HostColumn],
    plan: np.ndarray,
    *,
    host: int = 0,
    num_hosts: int = 1,
    start: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads the batches of a plan, or one host's shard of each.

    Args:
        columns: arrays [N, ...] by name, memory-mapped or not.
        plan: int [steps, batch], from `batches.plan_batches` or `plan_single_pass`.
        host: index of this host.
        num_hosts: number of hosts that share each batch.
        start: first step to read, for a resumed run.

    Yields:
        "row", int [batch / num_hosts], and the same rows of each column.

    Raises:
        ValueError: the batch is not divisible by the number of hosts.
    """
    readers = {name: _row_reader(column) for name, column in columns.items()}
    for rows in shard_plan(plan, host, num_hosts)[start:]:
        indices = rows.astype(np.intp)  # once, or each column would convert them
        yield {"row": rows} | {name: read(indices) for name, read in readers.items()}


def shard_plan(plan: np.ndarray, host: int, num_hosts: int) -> np.ndarray:
    """Returns one host's shard [steps, batch / num_hosts] of each global batch.

    Raises:
        ValueError: the batch is not divisible by the number of hosts.
    """
    batch = plan.shape[1]
    if batch % num_hosts or not 0 <= host < num_hosts:
        raise ValueError(f"batch {batch} has no shard {host} of {num_hosts} hosts")
    size = batch // num_hosts
    return plan[:, host * size : (host + 1) * size]


def _row_reader(column: np.ndarray | HostColumn) -> Callable[[np.ndarray], np.ndarray]:
    if isinstance(column, HostColumn):
        if not column.valid.all():
            return column.take
        column = column.array
    # np.memmap adds a constant cost to every gather; a plain array view does not.
    return functools.partial(np.asarray(column).take, axis=0)


def jpeg_dataset(paths: Sequence[pathlib.Path], size: int) -> Any:
    """Returns a tf.data pipeline that decodes JPEG files in every epoch.

    It is the unprepared baseline of the benchmarks.

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
