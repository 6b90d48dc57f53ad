"""Compiled programs are the same in every process, as caches and hosts require."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.methods.test_methods import CLOSED, METHODS

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import hashlib
import sys
from tests import toy
from ccu_jax.distributed import executors
from ccu_jax.train import step
from ccu_jax.methods import METHODS

problem = toy.make_problem(executors.pmap())
for name in sys.argv[1:]:
    program = METHODS[name](problem)
    replicate = problem.executor.replicate
    key = problem._replace(method=name).make_key("steps")
    state = replicate(step.init_state(program, key))
    inputs = toy.step_inputs_of(problem.executor, program)
    steps = problem.executor.compile(step.make_steps(program))
    text = steps.lower(state, replicate(step.static_inputs(program)), inputs).as_text()
    print(name, hashlib.sha256(text.encode()).hexdigest())
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
    def start(hash_seed):
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        flags.append("--xla_force_host_platform_device_count=2")
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *names],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": " ".join(flags),
            },
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
