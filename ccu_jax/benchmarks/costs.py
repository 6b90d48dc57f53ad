"""FLOPs, bytes accessed and memory of a step, and peak rates of the device."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ccu_jax.benchmarks.harness import count_cores, read_system_field
from ccu_jax.distributed.executors import Executor, vmap
from ccu_jax.runs import results
from ccu_jax.train import step
from ccu_jax.train.program import Program, State

# Dense bfloat16 FLOP/s from the data sheets, by a substring of `device_kind`.
DATASHEET_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "pillow", "tokenizers")
_PACKAGES += ("tensorflow", "tensorflow-cpu", "torch")


class Peaks(NamedTuple):
    """Peak throughput of one device."""

    flops: float  # FLOP/s measured with a large matrix product
    bytes: float  # bytes/s measured with a large copy
    datasheet: float | None  # bfloat16 FLOP/s, None if the device is not listed


def describe_machine() -> dict[str, Any]:
    """Returns the hardware, load, devices, commit and package versions of this run."""
    installed = {x.name.lower(): x.version for x in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in _PACKAGES if name in installed}
    return {
        "cpu": read_system_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": count_cores(),
        "memory": read_system_field("/proc/meminfo", "MemTotal"),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "commit": results.source_commit(),
        "versions": {"python": platform.python_version(), **versions},
    }


def make_step_args(
    program: Program, executor: Executor, num_steps: int
) -> tuple[State, Any, Any]:
    """Returns the state, static inputs and step inputs that `make_steps_fn` expects."""
    state = executor.replicate(step.init_state(program, jax.random.key(0)))
    static = executor.replicate(step.static_inputs(program))
    return state, static, step.send_batches(program, executor, 0, num_steps)


def count_flops(program: Program, executor: Executor) -> float:
    """Counts the FLOPs of one step over the global batch, with amortized refreshes.

    XLA counts library calls as 0 FLOPs, so the unoptimized program is counted, if the
    backend can. XLA counts a loop body once, so the program has a single step.
    """
    # A single program for the global batch, whatever the number of real devices.
    global_executor = vmap(executor.num_devices)

    def count(program: Program) -> float:
        args = make_step_args(program, global_executor, 1)
        # Lower from shapes: the arrays may be sharded over several devices.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        steps: Any = global_executor.compile(step.make_steps_fn(program))
        lowered = steps.lower(*shapes)
        # GPU backends may analyze compiled programs only.
        cost = lowered.cost_analysis() or lowered.compile().cost_analysis()
        return cost["flops"]

    return _average_refresh(program, count)


def measure_compiled(program: Program, executor: Executor) -> dict[str, float | None]:
    """Returns the bytes accessed by one compiled step and its memory, on one device.

    `bytes` includes amortized refreshes. `memory` is the size of arguments, results
    and temporaries in bytes. Each is None if the backend does not report it.
    """

    def compile_step(program: Program) -> Any:
        args = make_step_args(program, executor, 1)
        steps: Any = executor.compile(step.make_steps_fn(program))
        return steps.lower(*args).compile()

    def count_bytes(program: Program) -> float:
        cost = compile_step(program).cost_analysis() or {}
        return cost.get("bytes accessed", 0.0)

    accessed = _average_refresh(program, count_bytes)
    if (memory := compile_step(program).memory_analysis()) is not None:
        kinds = ("argument", "output", "temp")
        size = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
        memory = size - memory.alias_size_in_bytes
    return {"bytes": accessed or None, "memory": memory}


def _average_refresh(program: Program, count: Callable[[Program], float]) -> float:
    """Returns the cost of one step, including the amortized cost of refreshes."""
    if program.refresh is None:
        return count(program)
    plain = count(program._replace(refresh=None))
    return plain + (count(program) - plain) / program.refresh_every


def measure_peaks(dtype: str) -> Peaks:
    """Measures the peak FLOP/s and bytes/s of one device."""
    device = jax.devices()[0]
    # The matrix saturates the device, and the vector is larger than any cache.
    side, size = (2048, 1 << 25) if device.platform == "cpu" else (8192, 1 << 28)
    a, product = jnp.ones((side, side), dtype), jax.jit(lambda a: a @ a)
    x, copy = jnp.zeros(size, jnp.float32), jax.jit(lambda x: x + 1)
    datasheet = (x for name, x in DATASHEET_FLOPS.items() if name in device.device_kind)
    # The first call compiles and is discarded.
    product_s, copy_s = (
        statistics.median([measure_seconds(call) for _ in range(6)][1:])
        for call in (lambda: product(a), lambda: copy(x))
    )
    return Peaks(2 * side**3 / product_s, 2 * x.nbytes / copy_s, next(datasheet, None))


def measure_seconds(call: Callable[[], Any]) -> float:
    """Returns the wall time of a call in seconds, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def compute_utilization(
    flops: float, accessed: float | None, seconds: float, peaks: Peaks
) -> dict[str, float | None]:
    """Returns the fractions of one device's peak throughput that a step achieves.

    `mfu`: FLOP/s divided by the peak of the data sheet, or by the measured peak if the
    device is not listed. `roofline`: FLOP/s divided by the bound from arithmetic
    intensity (FLOPs per byte) and measured peaks (Williams et al. 2009); it may exceed
    1 for small programs, because XLA also counts accesses that hit a cache.
    """
    speed, roofline = flops / seconds, None
    if accessed:
        roofline = speed / min(peaks.flops, flops / accessed * peaks.bytes)
    return {"mfu": speed / (peaks.datasheet or peaks.flops), "roofline": roofline}
