"""What methods that train the visual tail alone work on: features computed once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.methods.problem import Problem
from ccu_jax.models import TAIL, VIEWS


class Cache(NamedTuple):
    """The rows a tail method works on, with all that the trunk and the text branch say.

    `rows`: their numbers, of those with a picture; `table`: unlearn rows first, then
    held-out (validation) rows and retain rows; `u`, `v`, `r`: where they stand in it.
    """

    table: dict
    rows: np.ndarray
    u: slice
    v: slice
    r: slice

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Where the parts end."""
        return self.u.stop, self.v.stop, self.r.stop


def cache(problem: Problem, retain_rows: int) -> Cache:
    """One pass of the original over the unlearn set, held-out rows and retain rows."""
    sets, forward = problem.sets, problem.forward
    has_image = np.asarray(problem.table["has_image"])
    # Rows without a picture have none to forget, and nothing to say of pictures.
    unlearn, held, retain = (
        rows[has_image[rows]] for rows in (sets.unlearn, sets.validation, sets.retain)
    )
    if retain_rows and len(retain) > retain_rows:
        retain = problem.some(retain, retain_rows, "retain rows")
    rows = np.concatenate([unlearn, held, retain])
    table = {
        "features": forward.features(problem.params, problem.table, rows),
        **_take(problem.table, rows, ("text", "labels", "has_image", "has_text")),
    }
    said = forward.outputs(problem.params, table, np.arange(len(rows)))
    del table["text"]
    table |= {name: said[name] for name in ("h_text", "z_text")}
    table |= {f"original_{view}": said[view] for view in VIEWS}
    table["row"] = problem.executor.place(np.arange(len(rows), dtype=np.int32))
    a, b = len(unlearn), len(unlearn) + len(held)
    return Cache(table, rows, slice(0, a), slice(a, b), slice(b, len(rows)))


@jax.jit
def _gather(table, rows):
    return jax.tree.map(lambda x: x[rows], table)


def _take(table, rows, names):
    return _gather({name: table[name] for name in names}, rows)


def part(table, where: slice):
    """The rows of a table that stand there."""
    return jax.tree.map(lambda x: x[where], table)


def split(problem: Problem):
    """The original's parts: what a tail method trains, and what it leaves alone."""
    train = {name: problem.params[name] for name in TAIL}
    frozen = {name: x for name, x in problem.params.items() if name not in TAIL}
    return train, frozen


def plan(problem: Problem, cached: Cache, config, *, held: bool = False):
    """Rows of the table for every step: `retain`, `unlearn`, and `held` if wanted."""
    parts = {
        "retain": (cached.r, config.batch),
        "unlearn": (cached.u, config.unlearn_batch),
    }
    if held:
        parts["held"] = (cached.v, config.held_batch)
    rows = np.arange(cached.r.stop)
    return {
        name: problem.batches(
            rows[where], batch, config.steps, name, of=cached.rows[where]
        )
        for name, (where, batch) in parts.items()
    }


@jax.jit
def pool(features):
    """Trunk features `[N, P, W]` to `[N, 2 W]`: class token and mean of the patches."""
    return jnp.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)
