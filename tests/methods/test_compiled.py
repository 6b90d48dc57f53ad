"""What is compiled is the same in every process: caches and other hosts rely on it."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.methods.test_methods import CLOSED, METHODS

HERE = pathlib.Path(__file__).parents[2]
PROGRAM = """
import hashlib
import sys
from tests import toy
from ccu_jax.distributed import executors as parallel
from ccu_jax.train import step
from ccu_jax.methods import METHODS

problem = toy.make_problem(parallel.pmap())
for name in sys.argv[1:]:
    program = METHODS[name](problem)
    place = problem.executor.replicate
    key = problem._replace(method=name).make_key("steps")
    state = place(step.init_state(program, key))
    share = toy.step_inputs_of(problem.executor, program)
    steps = problem.executor.compile(step.make_steps(program))
    text = steps.lower(state, place(step.static_inputs(program)), share).as_text()
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
def test_programs_do_not_hang_on_how_a_process_orders_its_sets(names):
    def started(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE)}
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        flags.append("--xla_force_host_platform_device_count=2")
        environment["XLA_FLAGS"] = " ".join(flags)
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lowered(process):
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-2000:]
        return out.splitlines()

    first, second = map(lowered, [started("1"), started("2")])
    assert len(first) == len(names) and first == second
