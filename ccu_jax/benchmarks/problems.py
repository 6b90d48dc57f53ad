"""Problems of random rows and random features, in the sizes that benchmarks measure.

The cost of a step depends on sizes alone, so nothing is learned here and no file is
read.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import models
from ccu_jax.config import Config
from ccu_jax.config.loading import load_config
from ccu_jax.distributed.executors import EXECUTORS, Executor
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.forward import Forward, pool_tokens
from ccu_jax.methods import METHODS, Problem
from ccu_jax.runs.progress import NullStage
from ccu_jax.train.loop import Loop
from ccu_jax.train.program import Program
from ccu_jax.unlearn_sets.splits import Sets


class Sizes(NamedTuple):
    """The sizes that determine the cost of a step.

    Attributes:
        config: name of the configuration in configs/ whose settings are used.
        rows: rows of the data set.
        classes: number of classes.
        multi_label: whether a row has several labels.
        image_size: side of an image in pixels.
        text_length: tokens of a text.
        vocabulary: number of token ids.
        unlearn_fraction: fraction of the training rows to forget.
        model: fields that replace those of the configuration's `model`.
        train: fields that replace those of its `train`.
    """

    config: str = "clipart"
    rows: int = 1408
    classes: int = 10
    multi_label: bool = False
    image_size: int = 48
    text_length: int = 16
    vocabulary: int = 2000
    unlearn_fraction: float = 0.1
    model: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()


_VIT_B16: dict[str, Any] = {
    "patch": 16,
    "image_width": 768,
    "image_depth": 12,
    "text_width": 528,  # a multiple of 12 heads
    "text_depth": 4,
    "heads": 12,
    "embed_dim": 512,
    "dtype": "bfloat16",
}
PRESETS = {
    "clipart": Sizes(),
    "mmimdb": Sizes("mmimdb", rows=3000, classes=23, multi_label=True, text_length=48),
    # 15,552 training rows, as in MM-IMDb.
    "vit_b16": Sizes(
        "mmimdb",
        rows=29_178,
        classes=23,
        multi_label=True,
        image_size=224,
        text_length=64,
        vocabulary=8000,
        model=tuple(_VIT_B16.items()),
    ),
    "tiny": Sizes("tiny", rows=280, image_size=16, text_length=8, vocabulary=200),
}


def make_config(sizes: Sizes) -> Config:
    """Returns the configuration of a problem."""
    config = load_config(sizes.config)
    data = dataclasses.replace(
        config.data, image_size=sizes.image_size, text_length=sizes.text_length
    )
    return dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(config.model, **dict(sizes.model)),
        train=dataclasses.replace(config.train, **dict(sizes.train)),
    )


def replace_section(problem: Problem, section: str, **fields: Any) -> Problem:
    """Returns the problem with fields of one section of its configuration replaced."""
    replaced = dataclasses.replace(getattr(problem.config, section), **fields)
    config = dataclasses.replace(problem.config, **{section: replaced})
    return problem._replace(config=config)


def make_problem(sizes: Sizes, executor: Executor, seed: int = 0) -> Problem:
    """Makes a problem of random rows with random parameters, on the devices."""
    rng = np.random.default_rng(seed)
    table = random_rows(sizes, rng)
    config = make_config(sizes)
    sets = random_sets(config, sizes, rng)
    return _make(sizes, executor, table, sets, seed)


def make_feature_problem(
    sizes: Sizes, executor: Executor, sets: Sets, store: feature_store.FeatureStore
) -> Problem:
    """Makes a problem whose rows have stored features and no images."""
    table = random_table_without_images(sizes)
    return _make(sizes, executor, table, sets, 0)._replace(store=store)


def _make(sizes: Sizes, executor: Executor, table, sets: Sets, seed: int) -> Problem:
    config, model = make_config(sizes), build_model(sizes)
    return Problem(
        config=config,
        model=model,
        forward=Forward(model, executor, config.run.evaluate_batch),
        executor=executor,
        table=executor.replicate(table),
        sets=sets,
        multi_label=sizes.multi_label,
        params=executor.replicate(model.init(jax.random.key(seed))),
        seed=seed,
    )


def make_step_problem(sizes: Sizes, executor: str, batch: int | None = None) -> Problem:
    """Makes a problem with stored features, and with `batch` rows a step if given."""
    problem = make_problem(sizes, EXECUTORS[executor]())
    compute = feature_store.make_compute_fn(
        problem.forward, problem.original, problem.table, problem.seed
    )
    columns = compute(np.arange(sizes.rows))
    store = feature_store.FeatureStore(columns, np.ones(sizes.rows, bool))
    problem = problem._replace(store=store)
    if batch is not None:
        for name in METHODS:
            section = name if hasattr(problem.config, name) else "train"
            if hasattr(getattr(problem.config, section), "batch"):
                problem = replace_section(problem, section, batch=batch)
    return problem


def change_executor(problem: Problem, name: str) -> Problem:
    """Returns the problem placed on the devices of another executor."""
    executor = EXECUTORS[name]()
    return problem._replace(
        executor=executor,
        forward=Forward(problem.model, executor, problem.config.run.evaluate_batch),
        table=executor.replicate(problem.table),
        params=executor.replicate(problem.params),
    )


def build_model(sizes: Sizes) -> models.Model:
    """Builds the classifier of a problem."""
    return models.build(
        make_config(sizes).model,
        num_classes=sizes.classes,
        vocab_size=sizes.vocabulary,
        image_size=sizes.image_size,
        text_length=sizes.text_length,
    )


def random_rows(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws the columns of a table: images, token ids and labels."""
    rows, side = np.arange(sizes.rows), sizes.image_size
    labels = np.zeros((sizes.rows, sizes.classes), np.float32)
    labels[rows, rng.integers(sizes.classes, size=sizes.rows)] = 1
    if sizes.multi_label:
        labels[rows, rng.integers(sizes.classes, size=sizes.rows)] = 1
    text = rng.integers(2, sizes.vocabulary, (sizes.rows, sizes.text_length))
    return {
        "image": rng.integers(0, 256, (sizes.rows, side, side, 3), dtype=np.uint8),
        "text": text.astype(np.int32),
        "labels": labels,
        "has_image": np.ones(sizes.rows, bool),
        "has_text": np.ones(sizes.rows, bool),
    }


def random_table_without_images(sizes: Sizes) -> dict[str, np.ndarray]:
    """Draws the columns of a table whose images are replaced by stored features."""
    table = random_rows(sizes._replace(image_size=0), np.random.default_rng(0))
    return {name: column for name, column in table.items() if name != "image"}


def random_sets(config: Config, sizes: Sizes, rng: np.random.Generator) -> Sets:
    """Splits the rows at random, by the fractions of the configuration."""
    rows = rng.permutation(sizes.rows)
    data, splits, rest = config.data, {}, rows
    for name, fraction, total in (
        ("test", data.test_fraction, len(rows)),
        ("validation", data.validation_fraction, len(rows)),
        ("unseen", config.unlearn.holdout_fraction, None),
        ("unlearn", sizes.unlearn_fraction, None),
    ):
        count = max(round(fraction * (len(rest) if total is None else total)), 1)
        splits[name], rest = np.sort(rest[:count]), rest[count:]
    return Sets(**splits, retain=np.sort(rest))


def sized_sets(rows: int, unlearn: int, validation: int) -> Sets:
    """Splits rows at random into sets of given sizes; the rest is the retain set."""
    order = np.random.default_rng(0).permutation(rows)
    few = max(1, validation // 10)
    ends = np.cumsum([unlearn, validation, few, few])
    parts = [np.sort(part) for part in np.split(order, ends)]
    names = ("unlearn", "validation", "unseen", "test", "retain")
    return Sets(**dict(zip(names, parts, strict=True)))


def feature_shapes(sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the columns of a feature store for one row, traced from the model."""
    model = build_model(sizes)

    def columns(params: models.Params) -> dict[str, jax.Array]:
        side = sizes.image_size
        image = jnp.zeros((1, side, side, 3), jnp.uint8)
        example = {
            "features": model.trunk(params, image),
            "h_text": model.encode_text(params, jnp.zeros((1, sizes.text_length), jnp.int32)),
            "has_image": jnp.ones(1, bool),
            "has_text": jnp.ones(1, bool),
        }
        out = model.apply(params, example)
        logits = {f"original_{view}": getattr(out, view) for view in models.VIEWS}
        stored = {name: example[name] for name in ("features", "h_text")}
        fresh = pool_tokens(example["features"])
        return {**stored, "z_text": out.z_text, **logits, "fresh": fresh}

    return jax.eval_shape(columns, jax.eval_shape(model.init, jax.random.key(0)))


def random_features(sizes: Sizes, seed: int) -> Callable[[np.ndarray], dict]:
    """Returns `columns(rows)`: random features in the shapes of the model's."""
    shapes, rng = feature_shapes(sizes), np.random.default_rng(seed)

    def columns(rows: np.ndarray) -> dict[str, np.ndarray]:
        result = {}
        for name, x in shapes.items():
            values = rng.standard_normal((len(rows), *x.shape[1:]), np.float32)
            if name == "z_text":
                values /= np.linalg.norm(values, axis=1, keepdims=True)
            result[name] = values.astype(x.dtype)
        return result

    return columns


def random_store(sizes: Sizes) -> feature_store.FeatureStore:
    """Returns a store of random features in memory."""
    columns = random_features(sizes, 0)(np.arange(sizes.rows))
    return feature_store.FeatureStore(columns, np.ones(sizes.rows, bool))


def build_program(name: str, problem: Problem) -> Program:
    """Builds the program of a method that evaluates its stop rule and ignores it.

    A model of random rows may satisfy the rule at once.
    """
    return METHODS[name](problem)._replace(stop=None)


def build_stepping_program(name: str, problem: Problem) -> Program:
    """Builds such a program.

    Raises:
        UserError: the method makes no optimizer steps.
    """
    program = build_program(name, problem)
    if program.loss is None:
        raise UserError(f"--methods: {name} makes no optimizer steps")
    return program


def make_unlearn(problem: Problem, folder: pathlib.Path) -> Callable[..., dict]:
    """Returns `unlearn()`: runs ccu_plus and returns its seconds; first compiles."""
    loop = Loop(problem.config.run, problem.executor, lambda text: None)

    def unlearn(problem: Problem = problem) -> dict[str, float]:
        outcome = loop.run(
            "ccu_plus", METHODS["ccu_plus"], problem, folder / "none", NullStage()
        )
        return {name: outcome.seconds[name] for name in ("start", "steps")}

    return unlearn
