"""Cached features, for methods that train only the modules after the trunk.

The trunk and the text branch are frozen, so their outputs are computed once per row.
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

    Tables are padded to one of a few lengths, so that unlearning requests of similar
    size share an executable. Padding rows are zeros, so `has_image` is false.

    Attributes:
        tables: sharded tables by part, with the columns of the feature store, `labels`,
            `has_image`, `has_text` and `row`, the row's number in its table.
        rows: row numbers in the data set by part, without padding.
    """

    tables: dict[str, dict[str, jax.Array]]
    rows: dict[str, np.ndarray]


def build_feature_tables(problem: Problem, max_retain_rows: int) -> FeatureTables:
    """Builds the tables from the feature store, or computes features if there is none.

    Retain sets larger than `max_retain_rows` are subsampled; 0 means no limit.
    """
    sets = problem.sets
    has_image = np.asarray(problem.table["has_image"])
    splits = {"unlearn": sets.unlearn, "held": sets.validation, "retain": sets.retain}
    # Only images are unlearned, so rows without an image are left out.
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
        tables[name] = pad_and_shard(problem.executor, table)
        start = end
    return FeatureTables(tables, rows)


def compute_padded_size(count: int, num_devices: int) -> int:
    """Rounds a row count up to one of a few multiples of `num_devices`.

    Few distinct lengths mean few compilations. From 32 rows on, padding adds at most
    25 %, unless there are many devices.
    """
    step = max(8, 2 ** max((count - 1).bit_length() - 3, 0))
    step = int(np.lcm(step, num_devices))
    return max(-(-count // step), 1) * step


def pad_and_shard(
    executor: Executor, table: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Pads a table with zeros to `compute_padded_size` rows and shards it."""
    num_rows = len(next(iter(table.values())))
    padding = compute_padded_size(num_rows, executor.num_devices) - num_rows
    return executor.shard_tree(
        {
            column: np.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1)))
            for column, x in table.items()
        }
    )


def replace_features_by_images(
    problem: Problem, cached: FeatureTables
) -> FeatureTables:
    """Replaces cached features with images, for methods that train the trunk."""
    tables = {}
    for name, table in cached.tables.items():
        images = {"image": read_rows(problem.table["image"], cached.rows[name])}
        tables[name] = {
            **{column: x for column, x in table.items() if column != "features"},
            **pad_and_shard(problem.executor, images),
        }
    return cached._replace(tables=tables)


def plan_feature_batches(
    problem: Problem, cached: FeatureTables, heldout_batch: int = 0
) -> dict[str, np.ndarray]:
    """Plans the batches of CCU: row numbers in each table, `[steps, batch]`, by part.

    `heldout_batch` is the number of validation rows per batch; 0 omits them.
    """
    config = problem.method_config
    sizes = {"retain": config.batch, "unlearn": config.unlearn_batch}
    if heldout_batch:
        sizes["held"] = heldout_batch
    return {
        name: problem.plan_batches(
            cached.rows[name], size, config.steps, name, by_index=True
        )
        for name, size in sizes.items()
    }
