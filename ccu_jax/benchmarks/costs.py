"""FLOPs, bytes and memory of a step, and the measured peaks of the device."""

import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ccu_jax.distributed.executors import Executor, vmap
from ccu_jax.train import step
from ccu_jax.train.program import Program, State

# Dense bfloat16 FLOP/s of the data sheets, by a part of the device's name.
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# Instructions, or calls into libraries that run convolutions.
_CONVOLUTION = re.compile(
    r"= \S+ convolution\(|custom_call_target=\"[^\"]*conv(?!ert)[^\"]*\"", re.IGNORECASE
)


class Peaks(NamedTuple):
    """What one device reaches at best.

    Attributes:
        flops: FLOP/s of a large matrix product.
        bytes: bytes/s of a large copy.
        datasheet: bfloat16 FLOP/s of the data sheet; None for unlisted devices.
    """

    flops: float
    bytes: float
    datasheet: float | None


def device_inputs(
    program: Program, executor: Executor, key: jax.Array, num_steps: int
) -> tuple[State, Any, Any]:
    """Returns initial state, static inputs and the inputs of the first steps."""
    state = executor.replicate(step.init_state(program, key))
    static = executor.replicate(step.static_inputs(program))
    return state, static, step.step_inputs(program, executor, 0, num_steps)


def count_flops(program: Program, executor: Executor) -> float:
    """Counts the FLOPs of one step over the global batch, refreshes averaged in.

    XLA counts the program before optimisation: fused library calls count as nothing.
    It counts the body of a loop once, hence a program of a single step.
    """
    local = vmap(executor.num_devices)
    inputs = device_inputs(program, local, jax.random.key(0), 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)

    def count(program: Program) -> float:
        steps: Any = local.compile(step.make_steps(program))
        return _cost(steps.lower(*shapes))["flops"]

    return _average_refresh(program, count)


def measure_compiled(program: Program, executor: Executor) -> dict[str, float | None]:
    """Returns `bytes` and `memory` of one compiled step on one device.

    `bytes`: bytes accessed, refreshes averaged in. `memory`: bytes of arguments,
    results and temporaries. None where the backend does not report it.
    """

    def compile_step(program: Program) -> Any:
        inputs = device_inputs(program, executor, jax.random.key(0), 1)
        steps: Any = executor.compile(step.make_steps(program))
        return steps.lower(*inputs).compile()

    memory = compile_step(program).memory_analysis()
    kinds = ("argument", "output", "temp")
    return {
        "bytes": _average_refresh(
            program, lambda p: _cost(compile_step(p)).get("bytes accessed", 0.0)
        )
        or None,
        "memory": memory
        and sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
        - memory.alias_size_in_bytes,
    }


def _cost(stage: Any) -> dict[str, float]:
    cost = stage.cost_analysis() or {}
    return cost[0] if isinstance(cost, list) else cost


def _average_refresh(program: Program, count: Callable[[Program], float]) -> float:
    """Counts a step without its refresh plus the share of a refresh."""
    if program.refresh is None:
        return count(program)
    plain = count(program._replace(refresh=None))
    return plain + (count(program) - plain) / program.refresh_every


def count_convolutions(text: str) -> int:
    """Counts the convolutions in the text of a compiled program."""
    return len(_CONVOLUTION.findall(text))


def large_product(dtype: str) -> tuple[Callable[[], jax.Array], int]:
    """Returns a matrix product that saturates one device, and its FLOPs."""
    side = 2048 if jax.devices()[0].platform == "cpu" else 8192
    a, product = jnp.ones((side, side), dtype), jax.jit(lambda a: a @ a)
    return lambda: product(a), 2 * side**3


@functools.cache
def measure_peaks(dtype: str = "float32") -> Peaks:
    """Measures the peaks of one device with a large product and a large copy."""
    device = jax.devices()[0]
    product, flops = large_product(dtype)
    # Larger than any cache.
    x = jnp.zeros(1 << (25 if device.platform == "cpu" else 28), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Peaks(
        flops=flops / _median_s(product),
        bytes=2 * x.nbytes / _median_s(lambda: copy(x)),
        datasheet=datasheet_flops(),
    )


def _median_s(call: Callable[[], Any], windows: int = 5) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(windows):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def datasheet_flops() -> float | None:
    """Returns the bfloat16 FLOP/s of this device's data sheet, or None."""
    kind = jax.devices()[0].device_kind
    return next((flops for name, flops in DATASHEET.items() if name in kind), None)


def utilization(
    flops: float, accessed: float | None, seconds: float, peaks: Peaks
) -> dict[str, float | None]:
    """Returns how well a step uses the device.

    `mfu`: its FLOP/s over the data sheet's, or over the measured peak without one.
    `roofline`: its FLOP/s over what its arithmetic intensity allows (Williams et al.
    2009), from measured peaks. Caches can serve bytes that XLA counts as accessed, so
    small programs may exceed 1.
    """
    speed = flops / seconds
    roofline = None
    if accessed:
        roofline = speed / min(peaks.flops, flops / accessed * peaks.bytes)
    return {"mfu": speed / (peaks.datasheet or peaks.flops), "roofline": roofline}
