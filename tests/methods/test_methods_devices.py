"""Methods are the same on any number of devices, under every executor and process."""

import functools
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.models import VIEWS
from tests import toy
from tests.methods.test_methods import CLOSED, METHODS, SLOW, each_method
from tests.train.test_step import prepare


def logits_after_steps(name, executor, lower_only=False):
    """Returns the logits of all rows after all steps of a method.

    Parameters are not compared: the bias of attention keys has no effect and a gradient
    of rounding errors, which Adam turns into steps.
    """
    problem = toy.with_fitted_labels(toy.make_problem(executor))
    program = METHODS[name](problem)._replace(stop=None)
    params = program.params
    if name not in CLOSED:
        # At the original, terms such as retention have a gradient of rounding errors.
        moved = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
        program = program._replace(params=executor.replicate(moved))
        steps, *arguments = prepare(executor, program)
        for x in jax.tree.leaves(program.sharded_tables):
            assert len(x) == executor.num_devices
        if lower_only:
            return steps.lower(*arguments)
        state, metrics = jax.device_get(steps(*arguments))
        assert metrics["ran"].all() and np.isfinite(metrics["loss"]).all()
        result = program.result or (lambda params, aux: params)
        params = result(state.params, state.aux)
    rows = np.arange(len(problem.table["labels"]))
    outputs = problem.forward.compute_outputs(
        {**problem.params, **params}, problem.table, rows
    )
    return {view: np.asarray(outputs[view]) for view in VIEWS}


@functools.cache
def logits_on_one_device(name):
    return logits_after_steps(name, executors.vmap(1))


def assert_same_as_on_one_device(name, executor):
    found, expected = logits_after_steps(name, executor), logits_on_one_device(name)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-4)


@each_method(fast=(), slow=("original", "neggrad_plus", "ccu_plus", "ssd"))
def test_eight_devices(name):
    assert_same_as_on_one_device(name, executors.pmap())


@pytest.mark.parametrize(
    "executor", ["shard_map", pytest.param("vmap", marks=pytest.mark.table)]
)
@each_method(fast=(), slow=("ccu_plus",))
def test_other_executors(name, executor):
    assert_same_as_on_one_device(name, executors.EXECUTORS[executor]())


@each_method(fast=(), slow=("original", "ccu", *SLOW, "scrub_rewind"))
def test_shard_map_accepts_all_outputs_as_replicated(name):
    assert logits_after_steps(name, executors.shard_map(), lower_only=True)


# --- processes ------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import hashlib
import sys
from ccu_jax.distributed import executors
from tests.methods.test_methods_devices import logits_after_steps

for name in sys.argv[1:]:
    lowered = logits_after_steps(name, executors.pmap(), lower_only=True)
    print(name, hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""
FEW = ("original", "salun", "scrub_rewind", "ccu_plus")
OTHERS = tuple(name for name in METHODS if name not in (*FEW, *CLOSED))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.slow, id="few"),
        pytest.param(OTHERS, marks=pytest.mark.table, id="others"),
    ],
)
def test_programs_do_not_depend_on_hash_seeds(names):
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append("--xla_force_host_platform_device_count=2")
    environment = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}

    def start(hash_seed):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *names],
            env={**os.environ, **environment, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    outputs = []
    for process in [start("1"), start("2")]:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-2000:]
        outputs.append(out.splitlines())
    assert len(outputs[0]) == len(names) and outputs[0] == outputs[1]
