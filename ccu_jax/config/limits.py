"""Which values a field of the configuration may have: the one place that says so.

A number that is not named here must not be negative. Sizes that must fit each other are
checked where they meet: `models.build`, `data.load`, `unlearn_set.draw`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.config.schema import Config
from ccu_jax.config.validation import closest
from ccu_jax.errors import UserError


class Limit(NamedTuple):
    """Smallest and largest value; `open_low`, `open_high`: these are excluded."""

    low: float = 0.0
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def allows(self, value: float) -> bool:
        """Whether the value lies within."""
        low = value > self.low if self.open_low else value >= self.low
        if self.high is None:
            return low
        return low and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """The limit in words that follow "must be"."""
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high is None:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


_COUNT = Limit(1)
_ABOVE = Limit(0, open_low=True)
_RATE = Limit(0, 1, open_high=True)
_SHARE = Limit(0, 1)

# By the whole key, or by its last part for what means the same in every section.
LIMITS = {
    "batch": _COUNT,
    "unlearn_batch": _COUNT,
    "heldout_batch": _COUNT,
    "steps": _COUNT,
    "check_every": _COUNT,
    "refresh_every": _COUNT,
    "epochs": _ABOVE,
    "learning_rate": _ABOVE,
    "temperature": _ABOVE,
    "retain_weight": _SHARE,
    "shrink": _SHARE,
    "ridge": _ABOVE,
    "saliency_fraction": Limit(0, 1, open_low=True),
    "slow_fraction": _SHARE,
    "repeats": _COUNT,
    "hang_timeout_s": _ABOVE,
    "repair_steps": _COUNT,
    "data.sample_rows": _COUNT,
    "corruptions.missing_image": _SHARE,
    "corruptions.missing_text": _SHARE,
    "corruptions.incomplete": _RATE,
    "corruptions.noisy_labels": _SHARE,
    "corruptions.noisy_text": _SHARE,
    "corruptions.window": _COUNT,
    "unlearn.holdout_fraction": Limit(0, 1, open_low=True, open_high=True),
    "unlearn.num_requests": _COUNT,
    "model.patch": _COUNT,
    "model.image_width": _COUNT,
    "model.text_width": _COUNT,
    "model.image_depth": _COUNT,
    "model.heads": _COUNT,
    "model.embed_dim": _COUNT,
    "model.dropout": _RATE,
    "train.warmup_fraction": _RATE,
    "train.modality_dropout": _SHARE,
    "train.word_dropout": _SHARE,
    "train.label_smoothing": _RATE,
    "run.steps_per_call": _COUNT,
    "run.checkpoint_steps": _COUNT,
    "run.evaluate_batch": _COUNT,
}

# Words that a field may be; by the whole key, or by its last part, as above.
CHOICES = {
    "corruptions.order": ("shuffled", "stored", "by_class"),
    "layers": ("head", "tail"),
    "model.dtype": ("float32", "bfloat16"),
    "run.executor": ("pmap", "shard_map", "vmap"),
    "run.features": ("stored", "computed"),
    "run.image_placement": ("auto", "device", "host"),
    "unlearn.duplicates": ("forget", "report"),
}


def check(config: Config) -> None:
    """Refuses a configuration with a number outside its limit, or an unknown word.

    Raises:
        UserError: the key, its value and what it must be.
    """
    for key, value in numbers(config):
        limit = limit_of(key)
        if not limit.allows(value):
            raise UserError(f"{key}={value:g}: it must be {limit} (--set {key}=...)")
    for key, word in words(config):
        choices = _found(CHOICES, key)
        if choices and word not in choices:
            raise UserError(f"{key}={word!r}: {closest(word, choices)}")


def limit_of(key: str) -> Limit:
    """The limit of a key (`train.epochs`)."""
    return _found(LIMITS, key) or Limit()


def _found(table, key):
    return table.get(key) or table.get(key.rpartition(".")[2])


def numbers(section: Any, above: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a tree of dataclasses with its dotted key."""
    for key, value in _leaves(section, above):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def words(section: Any) -> Iterator[tuple[str, str]]:
    """Every text of a tree of dataclasses with its dotted key."""
    for key, value in _leaves(section, ""):
        if isinstance(value, str):
            yield key, value


def _leaves(section, above):
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), above + field.name
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def check_batches(config: Config, methods: list[str], devices: int) -> None:
    """Refuses batches that the devices cannot share equally.

    Args:
        config: the configuration, whose sections are named after methods.
        methods: those that are to run; one without a section goes by `train`.
        devices: of all processes together.

    Raises:
        UserError: the key, its value and the next value that works.
    """
    for method in methods:
        name = method if hasattr(config, method) else "train"
        for key, value in numbers(getattr(config, name), f"{name}."):
            if key.endswith("batch") and value % devices:
                fits = -(-value // devices) * devices
                raise UserError(
                    f"{key}={value} cannot be divided among {devices} devices: give a "
                    f"multiple of {devices}, as with --set {key}={fits}"
                )
