"""Problems without pictures: what the original says of each row is a random store.

What unlearning costs depends on sizes alone. Rows here are features, so that there may
be a million of them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import models
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks.problems import Quiet, Sizes
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, Problem
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets.splits import Sets


def shapes(sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a store for one row each, by the model's own account."""
    model = _model(sizes)

    def columns(params):
        side = sizes.image_size
        image = jnp.zeros((1, side, side, 3), jnp.uint8)
        said = {
            "features": model.trunk(params, image),
            "h_text": model.read(params, jnp.zeros((1, sizes.text_length), jnp.int32)),
            "has_image": jnp.ones(1, bool),
            "has_text": jnp.ones(1, bool),
        }
        out = model.apply(params, said)
        logits = {f"original_{view}": getattr(out, view) for view in models.VIEWS}
        kept = {name: said[name] for name in ("features", "h_text")}
        fresh = features.pool_tokens(said["features"])
        return {**kept, "z_text": out.z_text, **logits, "fresh": fresh}

    return jax.eval_shape(columns, jax.eval_shape(model.init, jax.random.key(0)))


def row_bytes(sizes: Sizes) -> int:
    """Bytes of a store for each row."""
    columns = shapes(sizes).values()
    return 1 + sum(int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in columns)


def random_columns(sizes: Sizes, rng: np.random.Generator):
    """`columns(rows)` for `features.write`: random numbers in the shapes of a model."""
    of = shapes(sizes)

    def columns(rows):
        found = {}
        for name, x in of.items():
            drawn = rng.standard_normal((len(rows), *x.shape[1:]), np.float32)
            if name == "z_text":
                drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
            found[name] = drawn.astype(x.dtype)
        return found

    return columns


def random_store(sizes: Sizes, seed: int = 0) -> features.FeatureStore:
    """A store of random features in memory, for as many rows as `sizes` says."""
    columns = random_columns(sizes, np.random.default_rng(seed))
    rows = np.arange(sizes.rows)
    return features.FeatureStore(columns(rows), np.ones(sizes.rows, bool))


def make(
    sizes: Sizes, executor: str, sets: Sets, store: features.FeatureStore
) -> Problem:
    """A problem whose rows have features and no pictures.

    Args:
        sizes: of the rows and the model.
        executor: a row of `parallel.EXECUTORS`.
        sets: which rows are which.
        store: what the original says of all rows.
    """
    config, placed = bench_problem.settings(sizes), EXECUTORS[executor]()
    model = _model(sizes)
    return Problem(
        config=config,
        model=model,
        forward=Forward(model, placed, config.run.evaluate_batch),
        executor=placed,
        table=placed.replicate(table_of(sizes)),
        sets=sets,
        multi_label=sizes.multi_label,
        params=placed.replicate(model.init(jax.random.key(0))),
        seed=0,
        store=store,
    )


def table_of(sizes: Sizes) -> dict[str, np.ndarray]:
    """The columns of a run's table but for the pictures, which features stand for."""
    rng = np.random.default_rng(0)
    table = bench_problem.rows(sizes._replace(image_size=0), rng)
    return {name: x for name, x in table.items() if name != "image"}


def sets_of(sizes: Sizes, unlearn: int, validation: int) -> Sets:
    """So many rows to forget and held out, a few of the others, the rest retained."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(sizes.rows)
    few = max(1, validation // 10)
    ends = np.cumsum([unlearn, validation, few, few])
    parts = [np.sort(part) for part in np.split(rows, ends)]
    names = ("unlearn", "validation", "unseen", "test", "retain")
    return Sets(**dict(zip(names, parts, strict=True)))


def unlearner(problem: Problem, folder: pathlib.Path):
    """`run()`: seconds `start` and `steps` of ccu_plus; the first one compiles."""
    loop = Loop(problem.config.run, problem.executor, lambda text: None)

    def run(problem=problem):
        outcome = loop.run(
            "ccu_plus",
            METHODS["ccu_plus"],
            problem,
            folder / "none",
            Quiet(),
        )
        kept = {name: outcome.seconds[name] for name in ("start", "steps", "compile")}
        return {**kept, "made": outcome.steps}

    return run


def _model(sizes: Sizes) -> models.Model:
    return models.build(
        bench_problem.settings(sizes).model,
        classes=sizes.classes,
        vocabulary=sizes.vocabulary,
        image_size=sizes.image_size,
        text_length=sizes.text_length,
    )
