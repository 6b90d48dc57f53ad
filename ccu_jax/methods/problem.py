"""The input of a method: a trained model, the data, and the rows to unlearn."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config.schema import Config, Train
from ccu_jax.data import batches
from ccu_jax.distributed.device_tables import Table
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.evaluate.forward import Forward
from ccu_jax.models import Model, Params
from ccu_jax.unlearn_sets.splits import Sets


@dataclasses.dataclass(frozen=True, eq=False)
class Hyperparameters:
    """The real-valued fields of a method's configuration as a pytree.

    Nonzero values are leaves, so that other values do not recompile a program. Zeros
    are part of the treedef, so that a program omits terms whose weight is 0. Values are
    read as attributes.
    """

    _values: dict[str, Any]
    _zeros: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Any) -> "Hyperparameters":
        """Collects the real-valued fields of a configuration dataclass."""
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        real = {name: x for name, x in fields.items() if isinstance(x, float)}
        values = {name: np.float32(x) for name, x in real.items() if x}
        return cls(values, tuple(sorted(set(real) - set(values))))

    def is_active(self, name: str) -> bool:
        """Returns whether a weight is nonzero, as a Python bool even under tracing."""
        # The attribute raises AttributeError for an unknown name.
        return name in self._values or bool(getattr(self, name))

    def __getattr__(self, name: str) -> Any:
        """Returns the value of a hyperparameter."""
        if not name.startswith("_"):
            if name in self._values:
                return self._values[name]
            if name in self._zeros:
                return 0.0
        raise AttributeError(f"no real-valued hyperparameter {name!r}")


jax.tree_util.register_pytree_node(
    Hyperparameters,
    lambda hp: ((hp._values,), hp._zeros),
    lambda zeros, children: Hyperparameters(children[0], zeros),
)


class Problem(NamedTuple):
    """A trained model, the data, and the rows to unlearn.

    Attributes:
        config: the configuration of the run, with a section for each method.
        model: the classifier.
        forward: compiled forward passes.
        executor: runs per-device functions.
        table: columns of all rows: `image`, `text`, `labels`, `has_image`, `has_text`.
        sets: row numbers of the retain set, the unlearn set and the holdouts.
        multi_label: whether rows have several labels.
        params: the original's parameters, replicated; None until it is trained.
        seed: the seed of all random choices.
        method: name of the current method; its random choices depend on this name.
        store: the original's stored features; if None, they are computed when needed.
        stream_positions: `[N]`, position of each row in the training stream; if None,
            rows are shuffled freely.
    """

    config: Config
    model: Model
    forward: Forward
    executor: Executor
    table: Table
    sets: Sets
    multi_label: bool
    params: Params | None
    seed: int
    method: str = ""
    store: FeatureStore | None = None
    stream_positions: np.ndarray | None = None

    @property
    def train_config(self) -> Train:
        """The configuration section of training from scratch."""
        return self.config.train

    @property
    def method_config(self) -> Any:
        """The configuration section of the method."""
        return getattr(self.config, self.method)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The real-valued fields of `method_config`, as inputs of a program."""
        return Hyperparameters.from_config(self.method_config)

    @property
    def original(self) -> Params:
        """The original's parameters, which must be trained already."""
        assert self.params is not None
        return self.params

    def init_params(self, purpose: str) -> Params:
        """Returns replicated random parameters for one purpose of this method."""
        return self.executor.replicate(self.model.init(self.make_key(purpose)))

    def make_key(self, purpose: str) -> jax.Array:
        """Returns a JAX random key for one purpose of this method."""
        return jax.random.key(self._derive_seed(purpose))

    def make_rng(self, purpose: str) -> np.random.Generator:
        """Returns a NumPy generator for one purpose of this method."""
        return np.random.default_rng(self._derive_seed(purpose))

    def _derive_seed(self, purpose) -> int:
        # Python's `hash` of a string differs between processes.
        text = f"{self.seed}/{self.method}/{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 2**63

    def plan_batches(
        self,
        rows: Any,
        batch: int,
        steps: int,
        purpose: str,
        dataset_rows: Any = None,
    ) -> np.ndarray:
        """Plans batches `[steps, batch]` in shuffled epochs over `rows`.

        If `rows` are row numbers of another table, `dataset_rows` are the corresponding
        row numbers of the data set. Each purpose has its own shuffling.
        """
        rows, window = np.asarray(rows), None
        if self.stream_positions is not None:
            dataset_rows = rows if dataset_rows is None else dataset_rows
            order = np.argsort(self.stream_positions[dataset_rows], kind="stable")
            rows, window = rows[order], self.config.corruptions.window
        seed = self._derive_seed(purpose)
        return batches.plan_batches(rows, batch, steps, seed, window=window)

    def plan_epochs(
        self, rows: Any, batch: int, epochs: float, purpose: str
    ) -> np.ndarray:
        """Plans the batches of `epochs` epochs over `rows`, see `plan_batches`."""
        steps = self.count_steps(epochs, batch, rows)
        return self.plan_batches(rows, batch, steps, purpose)

    def count_steps(self, epochs: float, batch: int, rows: Any) -> int:
        """Returns the number of steps in `epochs` epochs over `rows`, at least 1."""
        return max(1, round(epochs * len(rows) / batch))

    def sample_rows(self, rows: np.ndarray, max_rows: int, purpose: str) -> np.ndarray:
        """Draws at most `max_rows` rows without replacement; 0 returns all rows."""
        if not max_rows or len(rows) <= max_rows:
            return rows
        return self.make_rng(purpose).choice(rows, max_rows, replace=False)
