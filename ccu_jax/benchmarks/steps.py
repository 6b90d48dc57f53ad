"""`python -m ccu_jax.benchmarks step`: optimizer steps, run in several ways.

One compiled scan against one call per step, the executors against each other, and JAX
against PyTorch. Everything is measured in turn, window by window.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ccu_jax.benchmarks import costs, problems
from ccu_jax.benchmarks.harness import (
    Progress,
    measure_in_turn,
    median_ratio,
    summarize,
)
from ccu_jax.benchmarks.torch_baseline import METHODS as TORCH_METHODS
from ccu_jax.benchmarks.torch_baseline import TorchProcess, missing_torch, write_inputs
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS, Problem
from ccu_jax.train import step
from ccu_jax.train.program import State

HELP = "optimizer steps: one scan or one call each, executors, and PyTorch"
SCAN, CALLS, PEAK = "scan", "one call per step", "peak"
TORCH_MODES = ("eager", "compile")
_METHODS = "original,neggrad_plus,scrub,ccu,ccu_plus"
_COMPARED_ROWS = 64
_MAX_BATCH = 1 << 16
_WINDOW_S = 1.0
# Simulated devices wait for each other: a long queue of calls can starve one of them.
_MAX_QUEUE = 16
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    add("--preset", choices=tuple(problems.PRESETS), default="clipart")
    add("--methods", metavar="A,B", default=_METHODS, help=f"default {_METHODS}")
    names = ",".join(EXECUTORS)
    add(
        "--executors",
        metavar="A,B",
        default=names,
        help="the first runs all methods, the others `original` and `ccu_plus`; "
        f"default {names}",
    )
    add("--windows", metavar="N", type=int, default=7, help="default 7")
    add("--batch", metavar="N", type=int, help="rows of a step; default as configured")
    add(
        "--torch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure PyTorch too, where it is installed; default yes",
    )


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError on flags that cannot be measured."""
    for flag, choices in (("methods", METHODS), ("executors", EXECUTORS)):
        names = getattr(flags, flag).split(",")
        for name in names:
            if name not in choices:
                raise UserError(
                    f"--{flag}: unknown name {name!r}; choose from {', '.join(choices)}"
                )
        if len(set(names)) < len(names):
            raise UserError(f"--{flag}: a name is given twice")
    if flags.windows < 1:
        raise UserError("--windows: must be at least 1")
    if flags.batch is not None and not 1 <= flags.batch <= _MAX_BATCH:
        raise UserError(f"--batch: must be in [1, {_MAX_BATCH}]")


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures every method; see `measure_method`."""
    sizes = problems.PRESETS[flags.preset]
    first, *others = flags.executors.split(",")
    problem = problems.make_step_problem(sizes, first, flags.batch)
    names = flags.methods.split(",")
    missing = missing_torch() if flags.torch else "--no-torch"
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder, process, difference = pathlib.Path(name), None, None
        compared = [name for name in names if name in TORCH_METHODS]
        try:
            if missing is None and compared:
                write_inputs(folder, problem, sizes, compared)
                process = TorchProcess(folder)
                difference = _compare_logits(process, problem)
            for name in names:
                result = measure_method(problem, name, others, flags.windows, process)
                results.append(result)
        finally:
            if process is not None:
                process.close()
    return {
        "preset": flags.preset,
        "dtype": problem.config.model.dtype,
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "datasheet_flops": costs.datasheet_flops(),
        "methods": results,
        "logits_difference": difference,
        "torch": missing or "measured",
    }


def _compare_logits(process: TorchProcess, problem: Problem) -> float:
    """Returns the largest difference of a logit or embedding to PyTorch's."""
    rows = np.arange(min(_COMPARED_ROWS, len(problem.table["labels"])))
    ours = problem.forward.outputs(problem.original, problem.table, rows)
    return max(
        float(np.abs(np.asarray(ours[name]) - x).max())
        for name, x in process.logits(len(rows)).items()
    )


class Steps:
    """The steps of a method, compiled as one scan and as single steps.

    Args:
        problem: its executor compiles the steps.
        name: the method.
        num_steps: steps of a window. None: all of a method on cached features, else
            as many as take about a second.
    """

    def __init__(self, problem: Problem, name: str, num_steps: int | None = None):
        """Compiles the scan."""
        self.name, self.problem = name, problem._replace(method=name)
        self.executor = problem.executor
        self.program = problems.build_stepping_program(name, self.problem)
        self.num_steps = num_steps or self._fit_window()
        plan = {
            part: np.resize(rows, (self.num_steps, rows.shape[1]))
            for part, rows in (self.program.plan or {}).items()
        }
        self.program = self.program._replace(plan=plan)
        self.state, self.static, self.inputs = self._inputs(self.num_steps)
        start = time.perf_counter()
        self.scan = self._compile((self.state, self.static, self.inputs))
        self.compile_s = time.perf_counter() - start

    @functools.cached_property
    def single(self) -> Any:
        """One step, compiled."""
        return self._compile(self._inputs(1))

    def _inputs(self, num_steps: int) -> tuple:
        key = self.problem.make_key("steps")
        return costs.device_inputs(self.program, self.executor, key, num_steps)

    def _compile(self, inputs: tuple) -> Any:
        steps: Any = self.executor.compile(step.make_steps(self.program), donate=True)
        return steps.lower(*inputs).compile()

    def _fit_window(self) -> int:
        if self.program.is_fully_sharded:
            return self.program.steps
        seconds = []
        for _ in range(2):  # the first call of a program is slower
            inputs = self._inputs(1)
            start = time.perf_counter()
            jax.block_until_ready(self.single(*inputs))
            seconds.append(time.perf_counter() - start)
        max_steps = self.problem.config.run.steps_per_call
        return max(2, min(int(_WINDOW_S / seconds[1]), max_steps))

    def run_scan(self) -> tuple[float, State]:
        """Returns the seconds of a step in one scan, and the last state."""
        state = self._copy_state()
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, _ = self.scan(state, self.static, self.inputs)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / self.num_steps, state

    def run_calls(self) -> tuple[float, State]:
        """Returns the same for one call per step, its row indices sent before."""
        state, program, single = self._copy_state(), self.program, self.single
        inputs = [
            step.step_inputs(program, self.executor, number, 1)
            for number in range(self.num_steps)
        ]
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        for number, of_step in enumerate(inputs):
            with jax.transfer_guard("disallow"):
                state, _ = single(state, self.static, of_step)
            if self.executor.num_devices > 1 and number % _MAX_QUEUE == 0:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / self.num_steps, state

    def _copy_state(self) -> State:
        # Steps donate their state.
        return jax.block_until_ready(self.executor.replicate(_copy(self.state)))


def measure_method(
    problem: Problem,
    name: str,
    executors: list[str],
    windows: int,
    process: TorchProcess | None,
) -> dict[str, Any]:
    """Measures the steps of a method.

    Returns:
        `seconds` of a step by way, `peak` FLOP/s of a large product in the same
        windows, `flops` of a step over the global batch, `convolutions` in the
        compiled scan, `torch_failed` by mode.
    """
    progress = Progress(name)
    progress("compiling", 0, 1)
    steps = Steps(problem, name)
    product, product_flops = costs.large_product(problem.config.model.dtype)

    def peak() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product())
        return product_flops / (time.perf_counter() - start)

    calls: dict[str, Callable[[], float]] = {
        SCAN: lambda: steps.run_scan()[0],
        CALLS: lambda: steps.run_calls()[0],
        PEAK: peak,
    }
    if name in ("original", "ccu_plus"):
        for executor in executors:
            other = Steps(
                problems.change_executor(problem, executor), name, steps.num_steps
            )
            calls[executor] = lambda other=other: other.run_scan()[0]
    failed: dict[str, str] = {}
    if process is not None and name in TORCH_METHODS:
        for mode in TORCH_MODES:
            reason = process.try_window(name, mode, steps.num_steps)
            if reason is not None:
                failed[mode] = reason
                continue
            calls[f"torch {mode}"] = functools.partial(
                process.window, name, mode, steps.num_steps
            )
    progress("compiling", 1, 1)
    summaries = {
        way: summarize(values)
        for way, values in measure_in_turn(calls, windows, progress).items()
    }
    return {
        "method": name,
        "steps": steps.num_steps,
        "rows": sum(plan.shape[1] for plan in (steps.program.plan or {}).values()),
        "compile_s": steps.compile_s,
        "peak": summaries.pop(PEAK),
        "seconds": summaries,
        "flops": costs.count_flops(steps.program, steps.executor),
        "convolutions": costs.count_convolutions(steps.scan.as_text()),
        "torch_failed": failed,
    }


def tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the table of steps; ratios are medians over windows."""
    header = ("method", "way", "ms", "low", "high", "x scan", "% of peak")
    table = Table(*header, title=f"{measured['preset']}: seconds of an optimizer step")
    devices = 1 if measured["platform"] == "cpu" else measured["devices"]
    for result in measured["methods"]:
        peak = result["peak"]["high"] * devices
        for way, seconds in result["seconds"].items():
            table.add_row(
                result["method"],
                way,
                *(f"{1e3 * seconds[name]:.3g}" for name in ("median", "low", "high")),
                f"{median_ratio(seconds, result['seconds'][SCAN]):.2f}",
                f"{100 * result['flops'] / seconds['median'] / peak:.1f}",
            )
    caption = f"PyTorch: {measured['torch']}"
    if measured["logits_difference"] is not None:
        caption += f", logits differ by at most {measured['logits_difference']:.1e}"
    for result in measured["methods"]:
        for mode, reason in result["torch_failed"].items():
            caption += f"; torch {mode} fails on {result['method']}: {reason}"
    table.caption = caption
    return [table]
