"""Synthetic unlearning problems with random rows, parameters and features.

The cost of a step depends only on shapes, so no data are read and nothing is learned.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ccu_jax import models
from ccu_jax.benchmarks.harness import Flag, one_of
from ccu_jax.config import Config
from ccu_jax.config.loading import load_config
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.feature_store import ComputeFn, FeatureStore
from ccu_jax.evaluate.forward import Forward, pool_tokens
from ccu_jax.methods import METHODS, Problem
from ccu_jax.runs.progress import NullStage
from ccu_jax.train.loop import Loop, Outcome
from ccu_jax.train.program import Program
from ccu_jax.unlearn_sets.splits import Sets

UNLEARN_FRACTION = 0.1  # of the training rows


class ProblemSpec(NamedTuple):
    """The configuration of a synthetic problem and the size of its data set."""

    config: Config  # `data.vocabulary` is the exact vocabulary size
    num_rows: int
    num_classes: int = 10
    multi_label: bool = False


WithConfig = TypeVar("WithConfig", ProblemSpec, Problem)


def replace_section(x: WithConfig, section: str, **fields: Any) -> WithConfig:
    """Returns a copy of `x` with fields of one configuration section replaced."""
    replaced = dataclasses.replace(getattr(x.config, section), **fields)
    return x._replace(config=dataclasses.replace(x.config, **{section: replaced}))


def _make_vit_b16() -> ProblemSpec:
    """Returns a ViT-B/16 problem with as many training rows as MM-IMDb, 15,552."""
    spec = ProblemSpec(load_config("mmimdb"), 29_178, 23, multi_label=True)
    data = {"image_size": 224, "text_length": 64, "vocabulary": 8000}
    model = {"patch": 16, "image_width": 768, "image_depth": 12, "heads": 12}
    # The width of the text tower must be a multiple of the number of heads.
    model |= {"text_width": 528, "text_depth": 4, "embed_dim": 512, "dtype": "bfloat16"}
    return replace_section(replace_section(spec, "data", **data), "model", **model)


PRESETS = {
    "clipart": ProblemSpec(load_config("clipart"), 1408),
    "mmimdb": ProblemSpec(load_config("mmimdb"), 3000, 23, multi_label=True),
    "vit_b16": _make_vit_b16(),
    "tiny": ProblemSpec(load_config("tiny"), 280),
}
PRESET_FLAG = Flag("--preset", one_of(PRESETS), "clipart", "size of the problem")


def make_problem(
    spec: ProblemSpec,
    executor: Executor,
    *,
    sets: Sets | None = None,
    has_store: bool = True,
    has_images: bool = True,
) -> Problem:
    """Builds a problem with random rows and parameters, replicated on the devices.

    With `has_images=False`, methods need the features in the random store. `sets`
    defaults to `split_as_configured(spec)`.
    """
    model, store = _build_model(spec), None
    if has_store:
        columns = make_random_features(spec, 0)(np.arange(spec.num_rows))
        store = FeatureStore(columns, np.ones(spec.num_rows, bool))
    return Problem(
        config=spec.config,
        model=model,
        forward=Forward(model, executor, spec.config.run.evaluate_batch),
        executor=executor,
        table=executor.replicate(_make_random_table(spec, spec.num_rows, has_images)),
        sets=sets or split_as_configured(spec),
        multi_label=spec.multi_label,
        params=executor.replicate(model.init(jax.random.key(0))),
        seed=0,
        store=store,
    )


def _build_model(spec: ProblemSpec) -> models.Model:
    data = spec.config.data
    return models.build(
        spec.config.model,
        num_classes=spec.num_classes,
        vocab_size=data.vocabulary,
        image_size=data.image_size,
        text_length=data.text_length,
    )


def _make_random_table(
    spec: ProblemSpec, num_rows: int, has_images: bool = True
) -> dict[str, np.ndarray]:
    rng, data = np.random.default_rng(0), spec.config.data
    labels = np.zeros((num_rows, spec.num_classes), np.float32)
    for _ in range(1 + spec.multi_label):
        labels[np.arange(num_rows), rng.integers(spec.num_classes, size=num_rows)] = 1
    # Token id 0 is padding and 1 is the unknown word.
    text = rng.integers(2, data.vocabulary, (num_rows, data.text_length), np.int32)
    has = np.ones(num_rows, bool)
    table = {"text": text, "labels": labels, "has_image": has, "has_text": has}
    if has_images:
        shape = (num_rows, data.image_size, data.image_size, 3)
        table["image"] = rng.integers(0, 256, shape, np.uint8)
    return table


def split_rows(num_rows: int, **sizes: int) -> Sets:
    """Splits rows randomly into sets of these sizes; the rest is the retain set."""
    order = np.random.default_rng(0).permutation(num_rows)
    parts = np.split(order, np.cumsum([*sizes.values()]))
    return Sets(**dict(zip([*sizes, "retain"], map(np.sort, parts), strict=True)))


def split_as_configured(spec: ProblemSpec) -> Sets:
    """Splits the rows randomly into sets of the configured fractions."""
    config = spec.config
    test = round(config.data.test_fraction * spec.num_rows)
    validation = round(config.data.validation_fraction * spec.num_rows)
    num_train = spec.num_rows - test - validation
    unseen = round(config.unlearn.holdout_fraction * num_train)
    unlearn = round(UNLEARN_FRACTION * (num_train - unseen))
    sizes = {"test": test, "validation": validation, "unseen": unseen}
    return split_rows(spec.num_rows, **sizes, unlearn=unlearn)


def make_random_features(spec: ProblemSpec, seed: int) -> ComputeFn:
    """Returns a function that maps row indices to random `FeatureStore` columns."""
    model, rng = _build_model(spec), np.random.default_rng(seed)

    def encode(params: models.Params, table: dict) -> dict[str, jax.Array]:
        encoded = {
            "features": model.trunk(params, table["image"]),
            "h_text": model.encode_text(params, table["text"]),
        }
        outputs = model.apply(params, table | encoded)
        logits = {f"original_{view}": getattr(outputs, view) for view in models.VIEWS}
        fresh = pool_tokens(encoded["features"])
        return {**encoded, **logits, "z_text": outputs.z_text, "fresh": fresh}

    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.eval_shape(encode, params, _make_random_table(spec, 1))

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        columns = {}
        for name, x in shapes.items():
            values = rng.standard_normal((len(rows), *x.shape[1:]), np.float32)
            if name == "z_text":
                values /= np.linalg.norm(values, axis=1, keepdims=True)
            columns[name] = values.astype(x.dtype)
        return columns

    return compute


def build_program(name: str, problem: Problem) -> Program:
    """Builds the program of a method, which evaluates its stop rule but never stops.

    Random rows could satisfy the rule at the first step.
    """
    return METHODS[name](problem._replace(method=name))._replace(stop=None)


def make_run(name: str, problem: Problem) -> Callable[..., Outcome]:
    """Returns `run(problem=problem)`, which runs a method; the first call compiles."""
    # A new Forward and Loop, so that no executables of other methods are reused.
    config, executor = problem.config.run, problem.executor
    forward = Forward(problem.model, executor, config.evaluate_batch)
    problem = problem._replace(forward=forward)
    loop = Loop(config, executor, lambda warning: None)
    method = functools.partial(build_program, name)

    def run(problem: Problem = problem) -> Outcome:
        # Use an empty folder, so that the run cannot resume from a checkpoint.
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = pathlib.Path(folder) / "checkpoints"
            return loop.run(name, method, problem, checkpoints, NullStage())

    return run
