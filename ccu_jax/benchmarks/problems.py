"""Problems of random rows in memory, in the sizes that benchmarks measure.

What steps cost depends on sizes alone: nothing is learned here, no files are read, and
neither TensorFlow nor a data set is needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax import models
from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Config
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, Problem
from ccu_jax.train.program import Program
from ccu_jax.unlearn_sets.splits import Sets


class Sizes(NamedTuple):
    """What costs depend on.

    `rows` of the data set, `share` of the training rows that is forgotten; `config`:
    a name of `configs/` whose settings count, but for `model` and `train`, fields that
    replace its own.
    """

    config: str = "clipart"
    rows: int = 1408
    classes: int = 10
    multi_label: bool = False
    image_size: int = 48
    text_length: int = 16
    vocabulary: int = 2000
    share: float = 0.1
    model: tuple[tuple[str, object], ...] = ()
    train: tuple[tuple[str, object], ...] = ()


_VIT_B = dict(
    patch=16,
    image_width=768,
    image_depth=12,
    text_width=528,  # a multiple of 12 heads
    text_depth=4,
    heads=12,
    embed_dim=512,
    dtype="bfloat16",
)

PRESETS = {
    "clipart": Sizes(),
    "mmimdb": Sizes("mmimdb", rows=3000, classes=23, multi_label=True, text_length=48),
    # So many rows that 15,552 are trained on, as in MM-IMDb; through a ViT-B/16.
    "vit_b16": Sizes(
        "mmimdb",
        rows=29_178,
        classes=23,
        multi_label=True,
        image_size=224,
        text_length=64,
        vocabulary=8000,
        model=tuple(_VIT_B.items()),
    ),
    "tiny": Sizes("tiny", rows=280, image_size=16, text_length=8, vocabulary=200),
}


class Quiet:
    """A stage that nobody watches."""

    def report_progress(self, *args: Any) -> None:
        """Says nothing."""

    def update(self, *args: Any, **metrics: Any) -> None:
        """Says nothing."""


def settings(sizes: Sizes) -> Config:
    """The configuration of a problem."""
    config = load_config(sizes.config, [])
    data = dataclasses.replace(
        config.data, image_size=sizes.image_size, text_length=sizes.text_length
    )
    return dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(config.model, **dict(sizes.model)),
        train=dataclasses.replace(config.train, **dict(sizes.train)),
    )


def with_batches(config: Config, change: Callable[[str, int], int]) -> Config:
    """The configuration with `change(field, old)` for each batch of every method."""
    for name in dict.fromkeys(m if hasattr(config, m) else "train" for m in METHODS):
        section = getattr(config, name)
        fields = [of.name for of in dataclasses.fields(section)]
        batches = {
            field: change(field, getattr(section, field))
            for field in fields
            if field.endswith("batch")
        }
        section = dataclasses.replace(section, **batches)
        config = dataclasses.replace(config, **{name: section})
    return config


def unstopped(name: str, problem: Problem) -> Program:
    """The program of a method, which asks its stop rule and does not obey it.

    Random rows may fulfil one at once.
    """
    return METHODS[name](problem)._replace(stop=None)


def stepping(name: str, problem: Problem) -> Program:
    """Such a program, whose steps are to be measured.

    Raises:
        UserError: it makes none.
    """
    program = unstopped(name, problem)
    if program.loss is None:
        raise UserError(f"--methods: {name} makes no steps")
    return program


def make(sizes: Sizes, executor: str = "pmap", seed: int = 0) -> Problem:
    """A problem of random rows with a random original, all of it on the devices.

    Args:
        sizes: of the rows and the model.
        executor: a row of `parallel.EXECUTORS`.
        seed: of the rows and of the original.
    """
    config = settings(sizes)
    rng = np.random.default_rng(seed)
    place = EXECUTORS[executor]()
    model = models.build(
        config.model,
        classes=sizes.classes,
        vocabulary=sizes.vocabulary,
        image_size=sizes.image_size,
        text_length=sizes.text_length,
    )
    table = rows(sizes, rng)
    return Problem(
        config=config,
        model=model,
        forward=Forward(model, place, config.run.evaluate_batch),
        executor=place,
        table=place.replicate(table),
        sets=sets(config, sizes, rng),
        multi_label=sizes.multi_label,
        params=place.replicate(model.init(jax.random.key(seed))),
        seed=seed,
    )


def rows(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The columns of a table: random pictures, words and labels."""
    count, side = sizes.rows, sizes.image_size
    labels = np.zeros((count, sizes.classes), np.float32)
    labels[np.arange(count), rng.integers(sizes.classes, size=count)] = 1
    if sizes.multi_label:
        labels[np.arange(count), rng.integers(sizes.classes, size=count)] = 1
    words = rng.integers(2, sizes.vocabulary, (count, sizes.text_length))
    return {
        "image": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "text": words.astype(np.int32),
        "labels": labels,
        "has_image": np.ones(count, bool),
        "has_text": np.ones(count, bool),
    }


def sets(config: Config, sizes: Sizes, rng: np.random.Generator) -> Sets:
    """Which rows are which, in the shares of the configuration."""
    shuffled = rng.permutation(sizes.rows)
    names = ("test", "validation", "unseen", "unlearn", "retain")
    shares = (
        config.data.test_fraction,
        config.data.validation_fraction,
        config.unlearn.holdout_fraction,
    )
    parts, rest = {}, shuffled
    for name, share in zip(names, (*shares, sizes.share), strict=False):
        of = len(shuffled) if name in ("test", "validation") else len(rest)
        count = max(round(share * of), 1)
        parts[name], rest = np.sort(rest[:count]), rest[count:]
    return Sets(**parts, retain=np.sort(rest))
