"""What is compiled is the same in every process: caches and other hosts rely on it."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
PROGRAM = """
import hashlib
import problems
from ccu_jax import parallel, step
from ccu_jax.methods import METHODS

problem = problems.problem(parallel.pmap())
for name in ("original", "neggrad_plus", "scrub", "ccu", "ccu_plus"):
    program = METHODS[name](problem._replace(method=name))
    place = problem.executor.place
    state = place(step.start_state(program, problem.key("steps")))
    index = {
        part: step.rows_of(
            problem.executor, {} if part in program.parts else program.table, plan, 1
        )
        for part, plan in program.plan.items()
    }
    steps = problem.executor.run(step.make_steps(program))
    share = {"parts": program.parts, "index": index}
    text = steps.lower(state, place(step.resident(program)), share).as_text()
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.slow
def test_programs_do_not_hang_on_how_a_process_orders_its_sets():
    def lowered(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE)}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    first, second = lowered("1"), lowered("2")
    assert len(first) == 5 and first == second
