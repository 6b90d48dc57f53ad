"""Cached features: the inputs of methods that train only modules behind the trunk.

Trunk and text branch are frozen, so their outputs are computed once per row.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import read_rows
from ccu_jax.evaluate import feature_store
from ccu_jax.methods.problem import Problem
from ccu_jax.models import Params

# The tables, in the order of the arrays below; "held" are rows of the validation set.
PARTS = ("unlearn", "held", "retain")


class FeatureTables(NamedTuple):
    """Tables of cached features of unlearn, validation and retain rows with an image.

    Tables are padded to one of few sizes, so that requests of similar size share an
    executable. Padding rows are zeros: `has_image` is false and gives them no weight.

    Attributes:
        tables: sharded tables by part of a batch; their columns are those of the
            feature store, labels, `has_image`, `has_text` and `row`, the row's number
            in its table.
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
    splits = zip(PARTS, (sets.unlearn, sets.validation, sets.retain), strict=True)
    # Rows without an image have no image to unlearn.
    rows = {name: split[has_image[split]] for name, split in splits}
    rows["retain"] = problem.sample_rows(rows["retain"], max_retain_rows, "retain rows")
    columns = _load_columns(problem, np.concatenate([rows[name] for name in PARTS]))
    tables, start = {}, 0
    for name in PARTS:
        end = start + len(rows[name])
        size = padded_size(end - start, problem.executor.num_devices)
        tables[name] = problem.executor.shard_tree(
            {
                **{key: pad_rows(x[start:end], size) for key, x in columns.items()},
                "row": np.arange(size, dtype=np.int32),
            }
        )
        start = end
    return FeatureTables(tables, rows)


def _load_columns(problem, rows):
    columns = {
        name: np.asarray(problem.table[name])[rows]
        for name in ("labels", "has_image", "has_text")
    }
    if problem.store is not None and problem.config.run.features == "stored":
        return columns | problem.store.take(rows)
    compute = feature_store.make_compute_fn(
        problem.forward, problem.original, problem.table, problem.seed
    )
    return columns | compute(rows)


def padded_size(count: int, num_devices: int) -> int:
    """Rounds a row count up to a multiple of `num_devices`.

    Few distinct sizes mean few compilations. From 32 rows on a count grows by at most a
    quarter, unless there are many devices.
    """
    step = max(8, 2 ** max((count - 1).bit_length() - 3, 0))
    step = int(np.lcm(step, num_devices))
    return max(-(-count // step), 1) * step


def pad_rows(x: np.ndarray, size: int) -> np.ndarray:
    """Appends zero rows to an array up to `size` rows."""
    return np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))


def with_images(problem: Problem, cached: FeatureTables) -> FeatureTables:
    """Replaces the trunk's features by images, for methods that train the trunk."""
    tables = {}
    for name, table in cached.tables.items():
        size = table["row"].shape[0] * table["row"].shape[1]
        images = read_rows(problem.table["image"], cached.rows[name])
        tables[name] = {
            **{column: x for column, x in table.items() if column != "features"},
            "image": problem.executor.shard(pad_rows(images, size)),
        }
    return cached._replace(tables=tables)


def split_modules(problem: Problem, trained: Iterable[str]) -> tuple[Params, Params]:
    """Splits the original's parameters into trained and frozen modules."""
    trained = tuple(trained)
    params = problem.original
    frozen = {name: x for name, x in params.items() if name not in trained}
    return {name: params[name] for name in trained}, frozen


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


def concat_parts(
    batch: Mapping[str, Mapping[str, Any]], dropout_part: str | None = None
) -> tuple[dict[str, jax.Array], Callable[[Any], dict[str, Any]]]:
    """Concatenates the parts of a batch for a single forward pass.

    One pass is faster to compile and to run than a pass for each part. Columns that
    some part lacks are left out; rows of `dropout_part` have `use_dropout`.

    Returns:
        The columns, and a function that splits the rows of a tree back into parts.
    """
    batch = {
        name: {
            **rows,
            "use_dropout": jnp.full(len(rows["labels"]), name == dropout_part),
        }
        for name, rows in batch.items()
    }
    shared = set.intersection(*(set(rows) for rows in batch.values()))
    columns = {
        # Sorted, because the program must be the same in every process.
        name: jnp.concatenate([rows[name] for rows in batch.values()])
        for name in sorted(shared)
    }
    ends = np.cumsum([0, *(len(rows["labels"]) for rows in batch.values())])

    def split_parts(tree):
        return {
            name: jax.tree.map(lambda x, a=a, b=b: x[a:b], tree)
            for name, a, b in zip(batch, ends[:-1], ends[1:], strict=True)
        }

    return columns, split_parts
