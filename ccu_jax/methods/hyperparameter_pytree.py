"""Hyperparameters as inputs of a compiled program instead of constants in it."""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_pytree_node_class
class Hyperparameters:
    """The real-valued fields of a method's configuration as a pytree.

    Nonzero values are leaves, so that an executable compiled for one value serves all
    others. Zeros belong to the structure of the tree: the program does not compute a
    term whose weight is 0. Values are read as attributes.
    """

    def __init__(self, values: dict[str, Any], zeros: tuple[str, ...]):
        """Stores nonzero values by name, and the names of the fields that are zero."""
        self._values, self._zeros = values, zeros

    @classmethod
    def from_config(cls, config: Any) -> "Hyperparameters":
        """Collects the real-valued fields of a configuration dataclass."""
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        real = {name: x for name, x in fields.items() if isinstance(x, float)}
        values = {name: np.float32(x) for name, x in real.items() if x}
        return cls(values, tuple(sorted(set(real) - set(values))))

    def is_active(self, name: str) -> bool:
        """Returns whether a weight is nonzero; a Python bool, also while tracing."""
        return name not in self._zeros and getattr(self, name) is not None

    def __getattr__(self, name: str) -> Any:
        """Returns a value by its name."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._zeros:
            return 0.0
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no real-valued hyperparameter {name!r}") from None

    def __repr__(self) -> str:
        """Returns values and zeros; `train.loop` identifies executables by it."""
        return f"Hyperparameters({self._values!r}, {self._zeros!r})"

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Returns leaves and structure, for JAX."""
        names = tuple(sorted(self._values))
        return tuple(self._values[name] for name in names), (names, self._zeros)

    @classmethod
    def tree_unflatten(cls, structure: tuple, leaves: tuple) -> "Hyperparameters":
        """Inverts `tree_flatten`, for JAX."""
        names, zeros = structure
        return cls(dict(zip(names, leaves, strict=True)), zeros)
