"""A section of the configuration as data of a program, not as constants in it."""

import dataclasses
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_pytree_node_class
class Hyperparameters:
    """The real numbers of a section (weights, temperatures) as the leaves of a tree.

    What was compiled for one weight serves every other. A zero stays part of the
    program: it decides what is computed at all.
    """

    def __init__(self, numbers: dict[str, Any], zeros: tuple[str, ...]):  # noqa: D107
        self._numbers, self._zeros = numbers, zeros

    @classmethod
    def from_section(cls, section: Any) -> "Hyperparameters":
        """The tree of a dataclass."""
        fields = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        real = {name: x for name, x in fields.items() if isinstance(x, float)}
        numbers = {name: np.float32(x) for name, x in real.items() if x}
        return cls(numbers, tuple(sorted(set(real) - set(numbers))))

    def is_active(self, name: str) -> bool:
        """Whether a weight is not zero: known while a program is made."""
        return name not in self._zeros and getattr(self, name) is not None

    def __getattr__(self, name: str) -> Any:  # noqa: D105
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._zeros:
            return 0.0
        try:
            return self._numbers[name]
        except KeyError:
            raise AttributeError(f"the section has no real number {name!r}") from None

    def __repr__(self) -> str:  # noqa: D105
        return f"Hyperparameters({self._numbers!r}, {self._zeros!r})"

    def tree_flatten(self):  # noqa: D102  of JAX
        names = tuple(sorted(self._numbers))
        return tuple(self._numbers[name] for name in names), (names, self._zeros)

    @classmethod
    def tree_unflatten(cls, names, leaves):  # noqa: D102  of JAX
        return cls(dict(zip(names[0], leaves, strict=True)), names[1])
