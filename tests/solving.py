"""Runs of methods on tiny problems, and what is asked of what comes of them."""

import collections
import functools

import jax
import numpy as np

from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods import METHODS
from ccu_jax.train.loop import Loop
from tests import problems


class Quiet:
    """A stage that nobody watches."""

    def tell(self, *args, **kwargs):
        pass

    def update(self, *args, **kwargs):
        pass


def no_complaints(text):
    raise AssertionError(text)


@functools.cache
def bench():
    """One problem and one loop for all tests of a file: what is compiled is kept."""
    problem = remembering(problems.problem(parallel.vmap(2)))
    return problem, new_loop(problem)


def remembering(problem):
    """The problem with an original that is right on all rows but the held-out ones.

    Else a stop rule might end a run before its first step.
    """
    every = np.arange(len(problem.table["labels"]))

    def said():
        return problem.forward.outputs(problem.params, problem.table, every)["image"]

    # About as many rows of each class.
    head = problem.params["image_head"]
    head = {**head, "bias": head["bias"] - np.median(said(), axis=0)}
    problem = problem._replace(params={**problem.params, "image_head": head})
    held = np.isin(every, problem.sets.validation)
    if problem.multi_label:
        labels = np.where(held[:, None], said() <= 0, said() > 0)
    else:
        labels = np.eye(problems.CLASSES)[(said().argmax(1) + held) % problems.CLASSES]
    labels = problem.executor.replicate(labels.astype(np.float32))
    return problem._replace(table={**problem.table, "labels": labels})


def new_loop(problem, config=None):
    """A loop that has compiled nothing yet."""
    return Loop(config or problem.config.run, problem.executor, no_complaints)


TRACES = collections.Counter()


def counted(name, traces=TRACES):
    """A method of the table whose loss counts how often it is traced."""

    def method(problem):
        program = METHODS[name](problem)
        if program.loss is None:
            return program

        def loss(*args):
            traces[name] += 1
            return program.loss(*args)

        return program._replace(loss=loss)

    return method


def run(name, folder, *, seed=0, changes=None, loop=None, traces=TRACES, **fields):
    """Run a method of the table from its start to its end; gives the problem, too."""
    problem, shared = bench()
    if changes:
        problem = problem._replace(config=problems.config(**changes))
    problem = problem._replace(seed=seed, **fields)
    method = METHODS[name] if loop else counted(name, traces)
    outcome = (loop or shared).run(name, method, problem, folder / "none", Quiet())
    assert outcome.diverged is None
    return outcome, problem._replace(method=name)


def other_numbers(section):
    """Another one for each real number of a section; none becomes zero, or is it now.

    But for how long it takes, and for whether all weights may move.
    """
    numbers = {k: x for k, x in vars(section).items() if isinstance(x, float) and x}
    fixed = (
        "epochs",
        *(["saliency_fraction"] * (numbers.get("saliency_fraction") == 1)),
    )
    return {k: 0.75 * x for k, x in numbers.items() if k not in fixed}


def same(a, b):
    """Whether two trees are the same to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def whole(part):
    """All rows of a table that is cut over the devices."""
    return {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in part.items()}


def alone(fn):
    """A per-device function as one of its arguments, on a single device."""
    return jax.vmap(fn, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)
