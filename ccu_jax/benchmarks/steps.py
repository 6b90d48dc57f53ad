"""`python -m ccu_jax.benchmarks step`: the time of one optimizer step.

Compares one compiled scan with one call per step, the executors with each other, and
JAX with PyTorch. The measurements of all variants are interleaved.
"""

import argparse
import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import models
from ccu_jax.benchmarks import costs, harness, problems
from ccu_jax.benchmarks.harness import Column, Flag, Measurements, Progress
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS, Problem
from ccu_jax.train import step
from ccu_jax.train.program import State

SCAN, CALLS = "scan", "one call per step"
TORCH_METHODS = ("original", "neggrad_plus")
TORCH_MODES = ("eager", "compile")
_METHODS = "original,neggrad_plus,scrub,ccu,ccu_plus"
_MAX_TORCH_PLAN = 32  # length of the batch plan that PyTorch repeats
# Simulated devices wait for each other; a long queue of calls can starve one.
_MAX_QUEUE = 16
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_COLUMNS = [
    Column("method", "method"),
    Column("variant", "variant"),
    Column("ms", "seconds", ",.3g", 1e3),
    Column("ratio to scan", "ratio", ".2f"),
    Column("GFLOP", "flops", ",.3g", 1e-9),
    Column("failure", "failure"),
]
CallTorch = Callable[..., Any]  # as yielded by `start_torch`


def measure(flags: argparse.Namespace) -> list[Measurements]:
    """Measures one step of every selected method, see `measure_method`."""
    spec = problems.PRESETS[flags.preset]
    others = {
        name: problems.make_problem(spec, EXECUTORS[name]()) for name in flags.executors
    }
    problem = others.pop(flags.executors[0])
    reason = _find_torch_skip_reason() if flags.torch else "--no-torch"
    names = [name for name in flags.methods if name in TORCH_METHODS]
    note, call_torch = f"PyTorch: {reason or 'measured'}", None
    with contextlib.ExitStack() as stack:
        if reason is None and names:
            call_torch = stack.enter_context(start_torch(problem, names))
        rows = []
        for name in flags.methods:
            rows += measure_method(problem, name, others, flags.windows, call_torch)
    title = f"{flags.preset}: one optimizer step"
    return [Measurements("steps", title, _COLUMNS, rows, note)]


class Steps:
    """The training steps of a method, compiled as one scan and as single steps."""

    def __init__(self, problem: Problem, name: str, num_steps: int | None = None):
        """Compiles a scan of `num_steps`, by default as many as one call of a run."""
        self.executor = problem.executor
        program = problems.build_program(name, problem)
        if program.loss is None:
            raise UserError(
                f"--methods: {name} has no optimizer steps; remove it from the list"
            )
        per_call = problem.config.run.steps_per_call
        default = program.steps if program.is_fully_sharded else per_call
        self.num_steps = num_steps or default
        plan = {
            part: np.resize(rows, (self.num_steps, rows.shape[1]))
            for part, rows in (program.plan or {}).items()
        }
        self.program = program._replace(plan=plan)
        args = costs.make_step_args(self.program, self.executor, self.num_steps)
        self.state, self.static, self.inputs = args
        self.scan = self._compile(args)

    @functools.cached_property
    def single(self) -> Any:
        """The executable of a single step."""
        return self._compile(costs.make_step_args(self.program, self.executor, 1))

    def _compile(self, args: tuple) -> Any:
        steps: Any = self.executor.compile(
            step.make_steps_fn(self.program), donate=True
        )
        return steps.lower(*args).compile()

    def run_scan(self) -> tuple[float, State]:
        """Runs all steps in one call; returns seconds per step and the final state."""
        return self._run(self.scan, [self.inputs])

    def run_calls(self) -> tuple[float, State]:
        """Runs one call per step, like `run_scan`; sending row indices is not timed."""
        make_inputs = functools.partial(step.send_batches, self.program, self.executor)
        inputs = [make_inputs(i, 1) for i in range(self.num_steps)]
        return self._run(self.single, inputs)

    def _run(self, compiled: Any, inputs: list[Any]) -> tuple[float, State]:
        # Copy the state, because the executable donates it.
        state = self.executor.replicate(_copy(self.state))
        jax.block_until_ready((state, inputs))
        start = time.perf_counter()
        for number, rows in enumerate(inputs):
            with jax.transfer_guard("disallow"):
                state, _ = compiled(state, self.static, rows)
            if self.executor.num_devices > 1 and number % _MAX_QUEUE == 0:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / self.num_steps, state


def measure_method(
    problem: Problem,
    name: str,
    others: dict[str, Problem],
    windows: int,
    call_torch: CallTorch | None,
) -> list[dict[str, Any]]:
    """Measures one step of a method in every variant.

    Returns:
        One row per `variant`: `seconds` per step, their `ratio` to the scan and `flops`
        of the global batch; or `failure`, the error of PyTorch.
    """
    progress = Progress(name)
    progress("compiling", 0, 1)
    steps = Steps(problem, name)
    calls: dict[str, Callable[[], float]] = {
        SCAN: lambda: steps.run_scan()[0],
        CALLS: lambda: steps.run_calls()[0],
    }
    for executor, other in others.items() if name in ("original", "ccu_plus") else ():
        scan = Steps(other, name, steps.num_steps).run_scan
        calls[executor] = lambda scan=scan: scan()[0]
    torch_calls, failures = _make_torch_calls(name, steps.num_steps, call_torch)
    calls |= torch_calls
    progress("compiling", 1, 1)
    results = harness.measure_interleaved(calls, windows, progress)
    seconds = {name: harness.summarize(values) for name, values in results.items()}
    flops = costs.count_flops(steps.program, steps.executor)
    rows = [
        {
            "method": name,
            "variant": variant,
            "seconds": summary,
            "ratio": harness.median_ratio(summary, seconds[SCAN]),
            "flops": flops,
        }
        for variant, summary in seconds.items()
    ]
    return rows + failures


def _make_torch_calls(
    name: str, num_steps: int, call_torch: CallTorch | None
) -> tuple[dict[str, Callable[[], float]], list[dict[str, Any]]]:
    """Returns functions that measure a window, by variant, and rows of failures."""
    calls, failures = {}, []
    if call_torch is None or name not in TORCH_METHODS:
        return calls, failures
    for mode in TORCH_MODES:
        args = ("measure_step", name, mode, num_steps, harness.count_cores())
        call, variant = functools.partial(call_torch, *args), f"torch {mode}"
        try:
            call()
        except RuntimeError as error:  # torch.compile fails in many ways
            failures.append({"method": name, "variant": variant, "failure": str(error)})
        else:
            calls[variant] = call
    return calls, failures


def _find_torch_skip_reason() -> str | None:
    """Returns why PyTorch is not measured, or None if it is."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    if jax.devices()[0].platform not in ("cpu", "gpu"):
        return "not supported on this kind of device"
    return None


@contextlib.contextmanager
def start_torch(problem: Problem, names: list[str]) -> Generator[CallTorch]:
    """Starts PyTorch in a process without JAX, so that thread pools do not compete.

    `names` is a subset of TORCH_METHODS. Yields `call(function, *args)`, which calls a
    function of `torch_training` by name.
    """
    environment = {
        "OMP_NUM_THREADS": str(harness.count_cores()),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no idle compile workers
    }
    with harness.start_child(**environment) as call:
        call("torch_training.set_inputs", make_torch_inputs(problem, names))
        yield lambda name, *args: call(f"torch_training.{name}", *args)


def make_torch_inputs(problem: Problem, names: list[str]) -> dict[str, Any]:
    """Returns the picklable inputs of `torch_training.load_inputs`."""
    programs = {name: problems.build_program(name, problem) for name in names}
    return {
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
        "config": problem.config,
        "multi_label": problem.multi_label,
        "params": flatten_params(problem.original),
        "table": {name: np.array(x) for name, x in problem.table.items()},
        "plans": {
            name: {
                part: rows[:_MAX_TORCH_PLAN].astype(np.int64)
                for part, rows in (program.plan or {}).items()
            }
            for name, program in programs.items()
        },
        "num_steps": {name: program.steps for name, program in programs.items()},
    }


def flatten_params(params: models.Params) -> dict[str, np.ndarray]:
    """Flattens parameters to a dict keyed by leaf path, `module/.../leaf`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.array(x) for path, x in leaves}


_EXECUTORS_HELP = "the first runs all methods, the others only original and ccu_plus"
_FLAGS = [
    problems.PRESET_FLAG,
    harness.names_flag("--methods", METHODS, _METHODS, "methods"),
    harness.names_flag("--executors", EXECUTORS, "", _EXECUTORS_HELP),
    Flag("--torch", bool, True, "measure PyTorch if it is installed"),
]
_HELP = "optimizer steps: one scan, one call per step, executors, and PyTorch"
COMMANDS = {"step": harness.Command(_HELP, _FLAGS, 7, measure)}
