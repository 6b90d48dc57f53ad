"""Cached features: the inputs of methods that train only modules behind the trunk.

Trunk and text branch are frozen, so their outputs are computed once per row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from ccu_jax.distributed.device_tables import read_rows
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate import feature_store
from ccu_jax.methods.problem import Problem


class FeatureTables(NamedTuple):
    """Cached features of unlearn, validation ("held") and retain rows with an image.

    Tables are padded to one of few sizes, so that requests of similar size share an
    executable. Padding rows are zeros: `has_image` is false and gives them no weight.

    Attributes:
        tables: sharded, by part; their columns are those of the feature store, labels,
            `has_image`, `has_text` and `row`, the row's number in its table.
        rows: row numbers in the data set, by part; without padding.
    """

    tables: dict[str, dict[str, jax.Array]]
    rows: dict[str, np.ndarray]


def build_feature_tables(problem: Problem, max_retain_rows: int) -> FeatureTables:
    """Builds the tables from the feature store, or computes the features.

    Retain sets larger than `max_retain_rows` are subsampled, unless it is 0.
    """
    sets = problem.sets
    has_image = np.asarray(problem.table["has_image"])
    splits = {"unlearn": sets.unlearn, "held": sets.validation, "retain": sets.retain}
    # Rows without an image have no image to unlearn.
    rows = {name: split[has_image[split]] for name, split in splits.items()}
    rows["retain"] = problem.sample_rows(rows["retain"], max_retain_rows, "retain rows")
    all_rows = np.concatenate(list(rows.values()))
    names = ("labels", "has_image", "has_text")
    columns = {name: np.asarray(problem.table[name])[all_rows] for name in names}
    if problem.store is not None and problem.config.run.features == "stored":
        columns |= problem.store.take(all_rows)
    else:
        compute = feature_store.make_compute_fn(
            problem.forward, problem.original, problem.table, problem.seed
        )
        columns |= compute(all_rows)
    tables, start = {}, 0
    for name, part_rows in rows.items():
        end = start + len(part_rows)
        table = {column: x[start:end] for column, x in columns.items()}
        table["row"] = np.arange(len(part_rows), dtype=np.int32)
        tables[name] = shard_padded(problem.executor, table)
        start = end
    return FeatureTables(tables, rows)


def padded_size(count: int, num_devices: int) -> int:
    """Rounds a row count up to a multiple of `num_devices`.

    Few distinct sizes mean few compilations. From 32 rows on a count grows by at most a
    quarter, unless there are many devices.
    """
    step = max(8, 2 ** max((count - 1).bit_length() - 3, 0))
    step = int(np.lcm(step, num_devices))
    return max(-(-count // step), 1) * step


def shard_padded(
    executor: Executor, table: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Shards a table over devices, after appending rows of zeros (`padded_size`)."""
    num_rows = len(next(iter(table.values())))
    padding = padded_size(num_rows, executor.num_devices) - num_rows
    return executor.shard_tree(
        {
            column: np.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))
            for column, x in table.items()
        }
    )


def with_images(problem: Problem, cached: FeatureTables) -> FeatureTables:
    """Replaces the trunk's features by images, for methods that train the trunk."""
    tables = {}
    for name, table in cached.tables.items():
        images = {"image": read_rows(problem.table["image"], cached.rows[name])}
        tables[name] = {
            **{column: x for column, x in table.items() if column != "features"},
            **shard_padded(problem.executor, images),
        }
    return cached._replace(tables=tables)


def plan_feature_batches(
    problem: Problem, cached: FeatureTables, heldout_batch: int = 0
) -> dict[str, np.ndarray]:
    """Plans batches of table rows, `[steps, batch]` by part, for the steps of CCU.

    `heldout_batch` is the number of validation rows of a batch; 0 leaves them out.
    """
    config = problem.method_config
    sizes = {"retain": config.batch, "unlearn": config.unlearn_batch}
    if heldout_batch:
        sizes["held"] = heldout_batch
    return {
        name: problem.plan_batches(
            np.arange(len(cached.rows[name])),
            size,
            config.steps,
            name,
            dataset_rows=cached.rows[name],
        )
        for name, size in sizes.items()
    }
