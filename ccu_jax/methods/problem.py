"""What a method is given."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config import Config
from ccu_jax.data import pipeline
from ccu_jax.evaluate import Forward
from ccu_jax.models import Model, Params
from ccu_jax.parallel import Executor
from ccu_jax.unlearn_set import Sets


class Problem(NamedTuple):
    """A trained model, the rows, and which of them to forget.

    Attributes:
        config: the whole configuration.
        model: the classifier's functions.
        forward: compiled passes over rows.
        executor: where things run.
        table: all rows, on the devices: `image`, `text`, `labels`, `has_image`,
            `has_text`.
        sets: row numbers in the table.
        multi_label: whether rows have several labels.
        params: the original's parameters on the devices; None while it is trained.
        seed: of every random choice.
    """

    config: Config
    model: Model
    forward: Forward
    executor: Executor
    table: dict[str, jax.Array]
    sets: Sets
    multi_label: bool
    params: Params | None
    seed: int

    def key(self, name: str) -> jax.Array:
        """A random key for one purpose."""
        # Words to numbers that are the same in every process, unlike Python's hash.
        number = int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "big") % 2**31
        return jax.random.fold_in(jax.random.key(self.seed), number)

    def batches(self, rows: Any, batch: int, steps: int, stream: int = 0) -> np.ndarray:
        """Row numbers `[steps, batch]`, epoch by epoch a permutation of `rows`."""
        return pipeline.batches(
            np.asarray(rows), batch, steps, seed=self.seed * 1000 + stream
        )

    def steps(self, epochs: float, batch: int, rows: Any) -> int:
        """Number of updates in so many passes over `rows`."""
        return max(1, round(epochs * len(rows) / batch))
