"""What a step costs by count: FLOPs by the compiler and by hand, and convolutions."""

import re

import jax

from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks.problems import Sizes
from ccu_jax.config.schema import Config
from ccu_jax.distributed.executors import Executor, vmap
from ccu_jax.train import step
from ccu_jax.train.program import Program

# As instructions, or as calls of libraries that make them.
_CONVOLUTION = re.compile(
    r"= \S+ convolution\(|custom_call_target=\"[^\"]*conv(?!ert)[^\"]*\"", re.IGNORECASE
)


def convolutions(text: str) -> int:
    """How many convolutions the text of a compiled program holds."""
    return len(_CONVOLUTION.findall(text))


def flops(program: Program, executor: Executor) -> float:
    """FLOPs of one step of the whole batch, refreshes shared out.

    Counted by the compiler in what it is given, before it changes anything: some of
    what it makes of it are calls that it does not count. A loop's body counts once and
    of two branches the dearer one, so this is one step, with its refresh or without.
    """
    place = vmap(executor.num_devices)
    given = bench_cost.given(program, place, jax.random.key(0), 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)

    def count(program):
        lowered = place.compile(step.make_steps(program)).lower(*shapes)
        cost = lowered.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    bare = count(program._replace(refresh=None))
    if program.refresh is None:
        return bare
    return bare + (count(program) - bare) / program.refresh_every


def training_flops(config: Config, sizes: Sizes, rows: int) -> float:
    """FLOPs of a training step by hand: the products of towers and heads alone.

    Forward once and backward twice; no gradient of the picture is wanted.
    """
    model, length = config.model, sizes.text_length
    width, patch = model.image_width, model.patch
    patches = (sizes.image_size // patch) ** 2
    cell = max(patch // 2, 1)
    edges = 8 * (patch // cell) ** 2
    embed = 2 * patches * (3 * patch**2 + edges) * width
    # The last block looks with two tokens at all, and ends with these two.
    image = (model.image_depth - 1) * _block(patches + 1, patches + 1, width)
    image += 2 * (2 + (patches + 1) * 2) * width**2
    image += 2 * (2 * 2 * (patches + 1) * width + 2 * width**2 + 16 * width**2)
    text = model.text_depth * _block(length, length, model.text_width)
    both = width + model.text_width
    heads = 2 * both * (model.embed_dim + sizes.classes)
    heads += 2 * (both * model.text_width + (both + model.text_width) * sizes.classes)
    return rows * (2 * embed + 3 * (image + text + heads))


def _block(queries, keys, width):
    attention = 2 * queries * 3 * width**2 + 4 * queries * keys * width
    return attention + 2 * queries * width**2 + 2 * queries * 8 * width**2
