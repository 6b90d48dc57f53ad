"""The ways in which the steps of one method can be run, a window of them at a time."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import step_indexing as bench_step_indexing
from ccu_jax.benchmarks.problems import Quiet
from ccu_jax.distributed import device_tables
from ccu_jax.methods import METHODS
from ccu_jax.train import step
from ccu_jax.train.loop import Loop
from ccu_jax.train.program import State

SCAN, LOOP = "one scan", "Python loop, same step"
INDEXING, OUTSIDE = "Python loop that indexes", "outside the step"
WHOLE, PEAK = "whole run", "peak"
# Simulated devices wait for each other; a long queue of steps can starve one of them.
_QUEUE = 16
_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Way(NamedTuple):
    """`run()` measures one window: numbers by name: seconds, shares, speeds."""

    name: str
    run: Callable[[], dict[str, float]]


def measure(ways: Sequence[Way], windows: int, tell) -> dict[str, list[float]]:
    """So many windows of all ways in turn; the first round, which warms up, apart."""
    found: dict[str, list[float]] = {}
    for window in range(windows + 1):
        tell("measuring windows", window, windows)
        # Now one and now the other first: noise that grows would favour one of them.
        for way in ways if window % 2 else ways[::-1]:
            numbers = way.run()
            if window:
                for name, number in numbers.items():
                    found.setdefault(name, []).append(number)
    return found


class Steps:
    """A method's steps, compiled for an executor: as one scan and one by one.

    Args:
        problem: what the method is given, its executor included.
        name: of the method.
        steps: in a window; None: all of the method, or what `seconds` hold.
        seconds: that a window takes at most where not all steps are made.
    """

    def __init__(self, problem, name, steps=None, seconds=1.0):  # noqa: D107
        self.name, self.problem = name, problem._replace(method=name)
        self.executor = problem.executor
        self.program = bench_problem.stepping(name, self.problem)
        self.tail = self.program.is_fully_sharded
        self._key = self.problem.key("steps")
        self.steps = steps or self._fitting(seconds)
        self._lengthen(self.steps)
        self.first, self.resident, self.share = self._given(self.steps)
        began = time.perf_counter()
        self.scan = self._compile((self.first, self.resident, self.share))
        self.compile_s = time.perf_counter() - began

    @functools.cached_property
    def single(self):
        """One step, compiled: nobody waits for it where nobody asks."""
        return self._compile(self._given(1))

    def _given(self, steps):
        return bench_cost.given(self.program, self.executor, self._key, steps)

    def _compile(self, given):
        made = self.executor.compile(step.make_steps(self.program), donate=True)
        return made.lower(*given).compile()

    def _fitting(self, seconds):
        if self.tail:
            return self.program.steps
        state, resident, share = self._given(1)
        # The first call of a program is slower than all others.
        state, _ = jax.block_until_ready(self.single(state, resident, share))
        frozen, table, (_, every), numbers = resident
        counts = self.executor.replicate(jnp.int32(2)), every
        resident = frozen, table, counts, numbers
        began = time.perf_counter()
        jax.block_until_ready(self.single(state, resident, share))
        fit = int(seconds / (time.perf_counter() - began))
        return max(2, min(fit, self.problem.config.run.steps_per_call))

    def _lengthen(self, steps):
        """The plan cut, or repeated, to so many steps."""
        plan = {
            name: np.resize(rows, (steps, rows.shape[1]))
            for name, rows in self.program.plan.items()
        }
        self.program = self.program._replace(plan=plan)

    def fresh(self):
        """The first state once more: steps consume theirs."""
        return jax.block_until_ready(self.executor.replicate(_copied(self.first)))

    def ways(self, folder: pathlib.Path) -> list[Way]:
        """The scan, both loops, and what the project's loop adds to the scan."""
        ways = [
            Way(SCAN, lambda: {SCAN: self.scanned()[0]}),
            Way(LOOP, lambda: {LOOP: self.looped()[0]}),
            Way(OUTSIDE, lambda: {OUTSIDE: self._outside(folder)}),
        ]
        if self.executor.num_devices == 1:
            indexed = bench_step_indexing.Indexing(self)
            ways.append(Way(INDEXING, lambda: {INDEXING: indexed.run()[0]}))
        return ways

    def scanned(self) -> tuple[float, State]:
        """Seconds of a step when all are one call, and the last state."""
        state = self.fresh()
        began = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, _ = self.scan(state, self.resident, self.share)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / self.steps, state

    def looped(self) -> tuple[float, State]:
        """The same when each step is a call, which is handed its rows' numbers."""
        state, program, single = self.fresh(), self.program, self.single
        tables = {
            n: {} if n in program.sharded_tables else program.table
            for n in program.plan
        }
        # Handed over before: what is measured is calling, not how numbers get there.
        handed = [
            {
                name: device_tables.send_rows(
                    self.executor, tables[name], plan[[number]], 1
                )
                for name, plan in program.plan.items()
            }
            for number in range(self.steps)
        ]
        jax.block_until_ready(handed)
        began = time.perf_counter()
        for number, index in enumerate(handed):
            with jax.transfer_guard("disallow"):
                share = {"sharded_tables": program.sharded_tables, "index": index}
                state, _ = single(state, self.resident, share)
            if self.executor.num_devices > 1 and number % _QUEUE == 0:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / self.steps, state

    def _outside(self, folder):
        """Share of the project's own loop that is not spent in the compiled steps.

        Both in the same run: the loop's clock, and in it the time from each call of
        the scan until its results are there. The loop is kept from working while the
        device does, so in long runs of several calls the share is smaller.
        """
        inside = []

        def call(*given):
            began = time.perf_counter()
            out = jax.block_until_ready(self.scan(*given))
            inside.append(time.perf_counter() - began)
            return out

        known = self.executor._replace(run=lambda fn, donate=False: _Known(call))
        # All steps in one call, as the scan has them.
        config = dataclasses.replace(
            self.problem.config.run,
            steps_per_call=self.steps,
            checkpoint_steps=self.steps,
        )
        loop = Loop(config, known, lambda text: None)
        done = loop.run(
            self.name,
            lambda problem: self.program,
            self.problem,
            folder,
            Quiet(),
        )
        return 1 - sum(inside) / done.seconds["steps"]


class _Known:
    """Stands for what an executor runs, where it has been compiled already."""

    def __init__(self, call):
        self._call = call

    def lower(self, *given):
        return self

    def as_text(self):
        return ""

    def compile(self):
        return self._call


def whole(steps: Steps) -> Way:
    """The run of a method from the request to its last step, compiled before.

    The start as the loop's clock has it, the first state, the rows' numbers and all
    steps.
    """
    method, executor, problem = METHODS[steps.name], steps.executor, steps.problem

    def run():
        # As `Loop` does it.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            return ran()

    def ran():
        began = time.perf_counter()
        program = method(problem)
        resident = executor.replicate(step.static_inputs(program))
        index = {
            name: device_tables.send_rows(executor, {}, plan, 1)
            for name, plan in program.plan.items()
        }
        state = executor.replicate(_copied(steps.first))
        share = {"sharded_tables": program.sharded_tables, "index": index}
        jax.block_until_ready(steps.scan(state, resident, share)[0])
        return {WHOLE: time.perf_counter() - began}

    return Way(WHOLE, run)


def peak(dtype: str) -> Way:
    """FLOPs a second of a large product, between the windows of what it judges.

    A machine that is busy now and then has no peak that could be measured once.
    """
    product, flops = bench_cost.large_product(dtype)

    def run():
        began = time.perf_counter()
        jax.block_until_ready(product())
        return {PEAK: flops / (time.perf_counter() - began)}

    return Way(PEAK, run)


def torch(process, steps: Steps, mode: str, failed: dict[str, str]) -> Way:
    """The same number of the same steps in PyTorch; why not, where it `failed`."""
    name = f"torch {mode}"
    total = steps.problem.config.ccu_plus.steps if steps.tail else steps.steps
    ask = functools.partial(process.window, steps.name, mode, steps.steps, total)

    def run():
        if f"{steps.name}, {mode}" in failed:
            return {}
        told = ask()
        if "failed" in told:
            failed[f"{steps.name}, {mode}"] = told["failed"].partition("\n")[0]
            return {}
        found = {name: told["steps"] / steps.steps}
        found[f"{name}, threads"] = told["threads"]
        if steps.tail:
            found[f"{name}, {WHOLE}"] = told["start"] + told["steps"]
        return found

    return Way(name, run)
