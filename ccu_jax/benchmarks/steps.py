"""`python -m ccu_jax.benchmarks step`: one optimizer step, run in several ways.

One compiled scan against one call per step, executors against each other, and JAX
against PyTorch. All ways are measured in turn, window by window.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from ccu_jax import models
from ccu_jax.benchmarks import costs, harness, problems
from ccu_jax.benchmarks.harness import Column, Command, Progress
from ccu_jax.config.schema import to_json
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS, Problem
from ccu_jax.train import step
from ccu_jax.train.program import State

HELP = "optimizer steps: one scan or one call each, executors, and PyTorch"
SCAN, CALLS, PEAK = "scan", "one call per step", "peak"
TORCH_METHODS = ("original", "neggrad_plus")
TORCH_MODES = ("eager", "compile")
_METHODS = ["original", "neggrad_plus", "scrub", "ccu", "ccu_plus"]
_COMPARED_ROWS = 64  # whose outputs are compared with PyTorch's
_MAX_TORCH_PLAN = 32  # steps of the plan that PyTorch gets; it repeats them
# Simulated devices wait for each other, and a long queue of calls can starve one.
_MAX_QUEUE = 16
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = functools.partial(harness.add_flag, parser)
    add("--preset", harness.one_of(problems.PRESETS), "clipart")
    add("--methods", harness.list_of(harness.one_of(METHODS)), _METHODS)
    executors = harness.list_of(harness.one_of(EXECUTORS))
    help_text = "the first runs all methods, the others original and ccu_plus"
    add("--executors", executors, [*EXECUTORS], help_text)
    add("--windows", harness.at_least(1), 7, "measurements of each")
    batch = harness.at_least(1)
    parser.add_argument("--batch", type=batch, help="rows of a step, not as configured")
    is_optional = argparse.BooleanOptionalAction
    help_text = "measure PyTorch if it is installed"
    parser.add_argument("--torch", action=is_optional, default=True, help=help_text)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures every method; see `measure_method`."""
    spec, batch = problems.PRESETS[flags.preset], flags.batch
    others = {
        name: problems.make_problem_with_batch(spec, EXECUTORS[name](), batch)
        for name in flags.executors
    }
    problem = others.pop(flags.executors[0])
    reason = _why_no_torch() if flags.torch else "--no-torch"
    names = [name for name in flags.methods if name in TORCH_METHODS]
    torch = difference = None
    with contextlib.ExitStack() as stack:
        if reason is None and names:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            torch = stack.enter_context(TorchProcess(folder, problem, names))
            difference = torch.compare_outputs(problem)
        results = [
            measure_method(problem, name, others, flags.windows, torch)
            for name in flags.methods
        ]
    return {
        "preset": flags.preset,
        "steps": [row for rows in results for row in rows],
        "output_difference": difference,
        "torch": reason or "measured",
    }


class Steps:
    """The steps of a method, compiled as one scan and as single steps.

    Args:
        problem: its executor compiles the steps.
        name: the method.
        num_steps: of one scan; by default as many as a run makes in one call.
    """

    def __init__(self, problem: Problem, name: str, num_steps: int | None = None):
        """Compiles the scan."""
        self.problem = problem._replace(method=name)
        self.executor = problem.executor
        self.program = problems.build_program(name, problem)
        if self.program.loss is None:
            raise UserError(f"--methods: {name} takes no optimizer steps; leave it out")
        per_call = problem.config.run.steps_per_call
        if self.program.is_fully_sharded:
            per_call = self.program.steps
        self.num_steps = num_steps or per_call
        plan = {
            part: np.resize(rows, (self.num_steps, rows.shape[1]))
            for part, rows in (self.program.plan or {}).items()
        }
        self.program = self.program._replace(plan=plan)
        args = self._make_args(self.num_steps)
        self.state, self.static, self.inputs = args
        self.scan = self._compile(args)

    @functools.cached_property
    def single(self) -> Any:
        """One step, compiled."""
        return self._compile(self._make_args(1))

    def _make_args(self, num_steps: int) -> tuple:
        key = self.problem.make_key("steps")
        return costs.make_step_args(self.program, self.executor, key, num_steps)

    def _compile(self, args: tuple) -> Any:
        steps: Any = self.executor.compile(step.make_steps(self.program), donate=True)
        return steps.lower(*args).compile()

    def run_scan(self) -> tuple[float, State]:
        """Runs all steps in one call; returns the seconds of a step and the state."""
        state = self._copy_state()
        start = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, _ = self.scan(state, self.static, self.inputs)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / self.num_steps, state

    def run_calls(self) -> tuple[float, State]:
        """Runs one call per step; its row numbers are sent before the clock starts."""
        state, single = self._copy_state(), self.single
        inputs = [
            step.step_inputs(self.program, self.executor, number, 1)
            for number in range(self.num_steps)
        ]
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        for number, rows in enumerate(inputs):
            with jax.transfer_guard("disallow"):
                state, _ = single(state, self.static, rows)
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
    others: dict[str, Problem],
    windows: int,
    torch: "TorchProcess | None",
) -> list[dict[str, Any]]:
    """Measures the steps of a method in every way.

    Returns:
        For each way `seconds` of a step, their `ratio` to those of the scan, `flops` of
        the global batch, and `of_peak`, FLOP/s as a fraction of those of a large
        product in the same windows. Or `failure`, why PyTorch cannot run the step.
    """
    progress = Progress(name)
    progress("compiling", 0, 1)
    steps = Steps(problem, name)
    calls, failures = _make_calls(steps, name, others, torch)
    progress("compiling", 1, 1)
    results = harness.measure_in_turn(calls, windows, progress)
    seconds = {way: harness.summarize(values) for way, values in results.items()}
    flops = costs.count_flops(steps.program, steps.executor)
    peak = seconds.pop(PEAK)["high"]
    if jax.devices()[0].platform != "cpu":  # devices of a CPU share its cores
        peak *= jax.device_count()
    rows = [
        {
            "method": name,
            "way": way,
            "seconds": summary,
            "ratio": harness.median_ratio(summary, seconds[SCAN]),
            "flops": flops,
            "of_peak": flops / summary["median"] / peak,
        }
        for way, summary in seconds.items()
    ]
    for way, text in failures.items():
        rows.append({"method": name, "way": way, "failure": text})
    return rows


def _make_calls(
    steps: Steps,
    name: str,
    others: dict[str, Problem],
    torch: "TorchProcess | None",
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Returns by way a function that measures a window, or the error of PyTorch."""
    product, product_flops = costs.make_large_product(steps.problem.config.model.dtype)
    failures: dict[str, str] = {}
    calls: dict[str, Callable[[], float]] = {
        SCAN: lambda: steps.run_scan()[0],
        CALLS: lambda: steps.run_calls()[0],
        PEAK: lambda: product_flops / costs.measure_seconds(product),
    }
    if name in ("original", "ccu_plus"):
        for executor, other in others.items():
            scan = Steps(other, name, steps.num_steps).run_scan
            calls[executor] = lambda scan=scan: scan()[0]
    if torch is not None and name in TORCH_METHODS:
        for mode in TORCH_MODES:
            way = f"torch {mode}"
            call = functools.partial(torch.measure_step, name, mode, steps.num_steps)
            try:
                call()
            except RuntimeError as error:  # torch.compile fails in many ways
                failures[way] = str(error)
            else:
                calls[way] = call
    return calls, failures


_COLUMNS = [
    Column("method", "method"),
    Column("way", "way"),
    *harness.spread_columns("ms", "seconds", ",.3g", 1e3),
    Column("x scan", "ratio", ".2f"),
    Column("GFLOP", "flops", ",.3g", 1e-9),
    Column("% of peak", "of_peak", ".1f", 100),
    Column("failure", "failure"),
]


def make_tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the table of steps."""
    title = f"{measured['preset']}: one optimizer step"
    note = f"PyTorch: {measured['torch']}"
    if (difference := measured["output_difference"]) is not None:
        note += f"; its outputs differ by at most {difference:.1e}"
    return [harness.make_table(title, _COLUMNS, measured["steps"], note)]


# --- PyTorch --------------------------------------------------------------------------


def _why_no_torch() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    if jax.devices()[0].platform not in ("cpu", "gpu"):
        return "not measured on this kind of device"
    return None


class TorchProcess(harness.ChildProcess):
    """Runs PyTorch without JAX, so that their thread pools do not compete.

    Args:
        folder: where the inputs are written.
        problem: parameters, table and configuration.
        names: methods, out of TORCH_METHODS.
    """

    def __init__(self, folder: str, problem: Problem, names: list[str]):
        """Writes the inputs."""
        self._inputs = pathlib.Path(folder) / "inputs.npz"
        self._threads = harness.num_cores()
        super().__init__(
            OMP_NUM_THREADS=str(self._threads),
            TORCHINDUCTOR_COMPILE_THREADS="1",  # idle workers would cost time
        )
        write_torch_inputs(self._inputs, problem, names)

    def compare_outputs(self, problem: Problem) -> float:
        """Returns the largest difference to the logits and embeddings of JAX."""
        rows = np.arange(min(_COMPARED_ROWS, len(problem.table["labels"])))
        params, table = problem.original, dict(problem.table)
        outputs = problem.forward.outputs(params, table, rows)
        theirs = self.call("torch_training", "compute_outputs", self._inputs, len(rows))
        return max(float(np.abs(outputs[k] - x).max()) for k, x in theirs.items())

    def measure_step(self, name: str, mode: str, num_steps: int) -> float:
        """Returns the seconds of a step, in the mode "eager" or "compile"."""
        args = (self._inputs, name, mode, num_steps, self._threads)
        return self.call("torch_training", "measure_steps", *args) / num_steps


def write_torch_inputs(path: pathlib.Path, problem: Problem, names: list[str]) -> None:
    """Writes what `torch_training.load_inputs` reads."""
    arrays: dict[str, Any] = {
        "config": json.dumps(to_json(problem.config)),
        "multi_label": problem.multi_label,
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
        **{f"params/{name}": x for name, x in flatten_params(problem.original).items()},
        **{f"table/{name}": np.asarray(x) for name, x in problem.table.items()},
    }
    for name in names:
        program = problems.build_program(name, problem)
        arrays[f"num_steps/{name}"] = program.steps
        for part, rows in (program.plan or {}).items():
            arrays[f"plan/{name}/{part}"] = rows[:_MAX_TORCH_PLAN]
    np.savez(path, allow_pickle=False, **arrays)


def flatten_params(params: models.Params) -> dict[str, np.ndarray]:
    """Returns the parameters by the path of their leaf, `module/.../leaf`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}


COMMANDS = {"step": Command(HELP, add_flags, measure, make_tables)}
