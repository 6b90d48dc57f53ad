"""What methods that train the visual tail alone work on: features computed once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.device_tables import read_rows
from ccu_jax.evaluate import feature_store as features
from ccu_jax.methods.problem import Problem

PARTS = ("unlearn", "held", "retain")


class FeatureTables(NamedTuple):
    """The rows a tail method works on, with all that the trunk and the text branch say.

    `parts`: a table each of unlearn rows, held-out (validation) rows and retain rows,
    cut over the devices; `rows`: which rows of the data set, of those with a picture.
    A table is filled up to one of few sizes, so that what was compiled for one request
    serves the next; what fills it up has no picture (`has_image`) and counts nowhere.
    """

    parts: dict[str, dict[str, jax.Array]]
    rows: dict[str, np.ndarray]


def build_feature_tables(problem: Problem, retain_rows: int) -> FeatureTables:
    """The rows of the original's store, or one pass of the original over them."""
    sets = problem.sets
    has_image = np.asarray(problem.table["has_image"])
    # Rows without a picture have none to forget, and nothing to say of pictures.
    of = dict(zip(PARTS, (sets.unlearn, sets.validation, sets.retain), strict=True))
    rows = {name: which[has_image[which]] for name, which in of.items()}
    if retain_rows and len(rows["retain"]) > retain_rows:
        rows["retain"] = problem.sample_rows(rows["retain"], retain_rows, "retain rows")
    columns = _columns(problem, np.concatenate([rows[name] for name in PARTS]))
    parts, start = {}, 0
    for name in PARTS:
        end = start + len(rows[name])
        size = padded_size(end - start, problem.executor.num_devices)
        parts[name] = problem.executor.shard_tree(
            {
                **{key: pad_rows(x[start:end], size) for key, x in columns.items()},
                "row": np.arange(size, dtype=np.int32),
            }
        )
        start = end
    return FeatureTables(parts, rows)


def padded_size(count: int, devices: int) -> int:
    """So many rows or some more: one of few sizes.

    From 32 rows on at most a quarter more, where there are not many devices.
    """
    step = max(8, 2 ** max((count - 1).bit_length() - 3, 0))
    # A power of two where the devices are, as always in practice.
    step = int(np.lcm(step, devices))
    return max(-(-count // step), 1) * step


def _columns(problem, rows):
    table = {
        name: np.asarray(problem.table[name])[rows]
        for name in ("labels", "has_image", "has_text")
    }
    if problem.store is not None and problem.config.run.features == "stored":
        return table | problem.store.take(rows)
    compute = features.make_compute_fn(
        problem.forward, problem.params, problem.table, problem.seed
    )
    return table | compute(rows)


def pad_rows(x, size):
    """Rows of zeros behind an array, up to so many."""
    return np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))


def with_images(problem: Problem, cached: FeatureTables) -> FeatureTables:
    """The same rows with their pictures in the place of the trunk's features."""
    parts = {}
    for name, part in cached.parts.items():
        rows = cached.rows[name]
        size = part["row"].shape[0] * part["row"].shape[1]
        image = pad_rows(read_rows(problem.table["image"], rows), size)
        kept = {column: x for column, x in part.items() if column != "features"}
        parts[name] = {**kept, "image": problem.executor.shard(image)}
    return FeatureTables(parts, cached.rows)


def split_modules(problem: Problem, parts):
    """The original's parts: what a method trains, and what it leaves alone."""
    train = {name: problem.params[name] for name in parts}
    frozen = {name: x for name, x in problem.params.items() if name not in parts}
    return train, frozen


def plan_batches(
    problem: Problem, cached: FeatureTables, config, *, held: bool = False
):
    """Rows of its table for every part and step: `retain`, `unlearn`, and `held`."""
    batch = {"retain": config.batch, "unlearn": config.unlearn_batch}
    if held:
        batch["held"] = config.heldout_batch
    return {
        name: problem.plan_batches(
            np.arange(len(cached.rows[name])),
            size,
            config.steps,
            name,
            of=cached.rows[name],
        )
        for name, size in batch.items()
    }


def concat_parts(batch, drop: str | None = None):
    """The rows of all parts of a batch as one, and how to cut what comes of it.

    One pass over all rows is less to compile, and to run, than a pass for each part.
    Columns that not all parts have are left out. `drop` names the part whose rows have
    dropout: a column of that name says so.
    """
    batch = {
        name: {**rows, "drop": jnp.full(len(rows["labels"]), name == drop)}
        for name, rows in batch.items()
    }
    shared = set.intersection(*(set(part) for part in batch.values()))
    rows = {
        # In an order that is the same in every process: the program hangs on it.
        name: jnp.concatenate([part[name] for part in batch.values()])
        for name in sorted(shared)
    }
    ends = np.cumsum([0, *(len(part["labels"]) for part in batch.values())])

    def cut(tree):
        return {
            name: jax.tree.map(lambda x, a=a, b=b: x[a:b], tree)
            for name, a, b in zip(batch, ends[:-1], ends[1:], strict=True)
        }

    return rows, cut
