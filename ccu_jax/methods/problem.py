"""The input of a method: a trained model, the data, and the rows to unlearn."""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.config.schema import Config
from ccu_jax.data import batches
from ccu_jax.distributed.device_tables import Table
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.evaluate.forward import Forward
from ccu_jax.models import Model, Params
from ccu_jax.unlearn_sets.splits import Sets

Rows = dict[str, jax.Array]  # columns of a batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Hyperparameters:
    """The real-valued fields of a method's configuration as a pytree.

    Nonzero values are leaves, so that other values do not recompile a program. Zeros
    are part of the treedef, so that a program omits terms whose weight is 0.
    """

    _values: dict[str, Any]
    _zeros: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_config(cls, config: Any) -> "Hyperparameters":
        """Collects the real-valued fields of a configuration dataclass."""
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        real = {name: x for name, x in fields.items() if isinstance(x, float)}
        values = {name: np.float32(x) for name, x in real.items() if x}
        return cls(values, tuple(sorted(set(real) - set(values))))

    def is_active(self, name: str) -> bool:
        """Returns whether a weight is nonzero, as a Python bool even under tracing."""
        # getattr raises AttributeError for an unknown name.
        return name in self._values or bool(getattr(self, name))

    def __getattr__(self, name: str) -> Any:
        """Returns the value of a hyperparameter."""
        if not name.startswith("_") and name in (*self._values, *self._zeros):
            return self._values.get(name, 0.0)
        raise AttributeError(f"no real-valued hyperparameter {name!r}")


class Problem(NamedTuple):
    """A trained model, the data, and the rows to unlearn."""

    config: Config  # configuration of the run, with a section for each method
    model: Model
    forward: Forward
    executor: Executor
    table: Table  # columns of all rows: image, text, labels, has_image, has_text
    sets: Sets  # row numbers of the retain set, the unlearn set and the holdouts
    multi_label: bool  # whether rows have several labels
    params: Params | None  # of the original, replicated; None before it is trained
    seed: int  # base seed of all random choices
    method: str = ""  # the current method; its random choices depend on this name
    store: FeatureStore | None = None  # features of the original; None: compute them
    # Position of each row `[N]` in the training stream; None: rows are shuffled freely.
    stream_positions: np.ndarray | None = None

    @property
    def method_config(self) -> Any:
        """The configuration section of the method."""
        return getattr(self.config, self.method)

    @property
    def original(self) -> Params:
        """The original's parameters, which must be trained already."""
        assert self.params is not None
        return self.params

    def init_params(self, purpose: str) -> Params:
        """Returns replicated random parameters for the key of `purpose`."""
        return self.executor.replicate(self.model.init(self.make_key(purpose)))

    def make_key(self, purpose: str) -> jax.Array:
        """Returns a JAX random key derived from `seed`, `method` and `purpose`."""
        return jax.random.key(self._derive_seed(purpose))

    def make_rng(self, purpose: str) -> np.random.Generator:
        """Returns a NumPy generator seeded by `seed`, `method` and `purpose`."""
        return np.random.default_rng(self._derive_seed(purpose))

    def _derive_seed(self, purpose) -> int:
        # Python's `hash` of a string differs between processes.
        text = f"{self.seed}/{self.method}/{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % 2**63

    def plan_batches(
        self, rows: Any, batch: int, steps: int, purpose: str, by_index: bool = False
    ) -> np.ndarray:
        """Plans batches `[steps, batch]` in shuffled epochs over `rows`.

        With `by_index`, entries are indices into `rows`, that is, row numbers of a
        table made of these rows. `purpose` seeds the shuffling.
        """
        rows = np.asarray(rows)
        entries, window = np.arange(len(rows)) if by_index else rows, None
        if self.stream_positions is not None:
            order = np.argsort(self.stream_positions[rows], kind="stable")
            entries, window = entries[order], self.config.corruptions.window
        seed = self._derive_seed(purpose)
        return batches.plan_batches(entries, batch, steps, seed, window=window)

    def plan_epochs(
        self, rows: Any, batch: int, purpose: str, epochs: float = 0
    ) -> np.ndarray:
        """Plans the batches of `epochs` epochs; 0 means those of `method_config`."""
        steps = self.count_steps(epochs or self.method_config.epochs, batch, rows)
        return self.plan_batches(rows, batch, steps, purpose)

    def count_steps(self, epochs: float, batch: int, rows: Any) -> int:
        """Returns the number of steps in `epochs` epochs over `rows`, at least 1."""
        return max(1, round(epochs * len(rows) / batch))

    def sample_rows(self, rows: np.ndarray, max_rows: int, purpose: str) -> np.ndarray:
        """Draws at most `max_rows` rows without replacement; 0 means no limit."""
        if not max_rows or len(rows) <= max_rows:
            return rows
        return self.make_rng(purpose).choice(rows, max_rows, replace=False)
