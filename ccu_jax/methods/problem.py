"""What a method is given."""

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config.schema import Config
from ccu_jax.data.batches import plan_batches
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.evaluate.forward import Forward
from ccu_jax.models import Model, Params
from ccu_jax.unlearn_sets.splits import Sets


class Problem(NamedTuple):
    """A trained model, the rows, and which of them to forget.

    Attributes:
        config: the whole configuration.
        model: the classifier's functions.
        forward: compiled passes over rows.
        executor: where things run.
        table: all rows, on the devices: `image` (which may be an `HostColumn`), `text`,
            `labels`, `has_image`, `has_text`.
        sets: row numbers in the table.
        multi_label: whether rows have several labels.
        params: the original's parameters on the devices; None while it is trained.
        seed: of every random choice.
        method: the name of the one that runs; each draws numbers of its own.
        store: the original's features; None: they are computed when they are needed.
        arrival: the place of each row in the order of training; None: in no order.
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
    method: str = ""
    store: FeatureStore | None = None
    stream_positions: np.ndarray | None = None

    @property
    def method_config(self) -> Any:
        """What the configuration says of the method: the section of its name."""
        return getattr(self.config, self.method)

    def make_key(self, name: str) -> jax.Array:
        """A random key for one purpose of this method."""
        return jax.random.key(self._seed(name))

    def plan_batches(
        self, rows: Any, batch: int, steps: int, name: str, of: Any = None
    ) -> np.ndarray:
        """Row numbers `[steps, batch]`, epoch by epoch a permutation of `rows`.

        `name` says what for: each has an order of its own. `of` says which rows of the
        data set they are, where `rows` are numbers in another table.
        """
        rows, window = np.asarray(rows), None
        if self.stream_positions is not None:
            of = rows if of is None else of
            rows = rows[np.argsort(self.stream_positions[of], kind="stable")]
            window = self.config.corruptions.window
        return plan_batches(rows, batch, steps, self._seed(name), window=window)

    def sample_rows(self, rows: Any, count: int, name: str) -> np.ndarray:
        """So many of the rows, drawn at random; what it costs hangs on `count`."""
        return self.make_rng(name).choice(np.asarray(rows), count, replace=False)

    def make_rng(self, name: str) -> np.random.Generator:
        """Random numbers on the host for one purpose of this method."""
        return np.random.default_rng(self._seed(name))

    def _seed(self, name):
        # The same in every process, unlike Python's own hash.
        text = f"{self.seed}/{self.method}/{name}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 2**63

    def count_steps(self, epochs: float, batch: int, rows: Any) -> int:
        """Number of updates in so many passes over `rows`."""
        return max(1, round(epochs * len(rows) / batch))
