"""What a program costs by count, and what the machine could do: FLOPs, bytes, peaks."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.distributed.executors import Executor
from ccu_jax.train import step
from ccu_jax.train.program import Program

# Dense bfloat16 FLOPs a second that data sheets name, by a part of the device's name.
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def given(program: Program, executor: Executor, key, steps: int) -> tuple:
    """State, resident part and share of the first steps, on the devices."""
    state = executor.replicate(step.init_state(program, key))
    resident = executor.replicate(step.static_inputs(program))
    return state, resident, step.step_inputs(program, executor, 0, steps)


def of_step(program: Program, executor: Executor, key) -> dict[str, float | None]:
    """What one step costs, by XLA's own count of the compiled program.

    XLA counts a loop's body once and of two branches the dearer one, so a program of
    one step is counted, once with its refresh and once without; a refresh falls on
    every `refresh_every`-th step.

    Returns:
        `flops` and `bytes` of a step on one device, refreshes shared out, and `memory`:
        bytes of arguments, results and temporary values of the compiled program.
    """
    whole = _count(program, executor, key)
    if program.refresh is None:
        return whole
    bare = _count(program._replace(refresh=None), executor, key)
    share = 1 / program.refresh_every
    mixed = {n: bare[n] + share * (whole[n] - bare[n]) for n in ("flops", "bytes")}
    return {**whole, **mixed}


def _count(program, executor, key):
    steps = executor.compile(step.make_steps(program))
    compiled = steps.lower(*given(program, executor, key, 1)).compile()
    return counted(compiled)


def counted(compiled) -> dict[str, float | None]:
    """FLOPs, bytes and memory of something compiled; None where XLA does not tell."""
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    return {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "memory": memory
        and sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
        - memory.alias_size_in_bytes,
    }


def median_s(call: Callable[[], Any], windows: int = 5) -> float:
    """Median seconds of a call whose results are waited for, after a first one."""
    jax.block_until_ready(call())
    took = []
    for _ in range(windows):
        began = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def large_product(dtype: str) -> tuple[Callable[[], jax.Array], int]:
    """A product that nothing on this device could make faster, and its FLOPs."""
    side = 2048 if jax.devices()[0].platform == "cpu" else 8192
    a, product = jnp.ones((side, side), dtype), jax.jit(lambda a: a @ a)
    return lambda: product(a), 2 * side**3


@functools.cache
def peaks(dtype: str = "float32") -> dict[str, Any]:
    """What one device does at best, measured: a large product, a large copy.

    Returns:
        `flops` and `bytes` a second; `datasheet`, the FLOPs that are advertised for
        bfloat16 on devices that are known, and their `kind`.
    """
    device = jax.devices()[0]
    product, flops = large_product(dtype)
    # The numbers that are read and written once: more than any cache holds.
    x = jnp.zeros(1 << (25 if device.platform == "cpu" else 28), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops": flops / median_s(product),
        "bytes": 2 * x.nbytes / median_s(lambda: copy(x)),
        "datasheet": advertised(),
        "kind": _kind(),
    }


def advertised() -> float | None:
    """FLOPs a second that the data sheet of this device names, if it is known."""
    return DATASHEET.get(_kind())


def _kind():
    kind = jax.devices()[0].device_kind
    return next((name for name in DATASHEET if name in kind), None)


def judged(cost: dict, seconds: float, peak: dict) -> dict[str, float | None]:
    """How well a step uses the device.

    `mfu`: its FLOPs a second as a share of the peak (of the data sheet where there is
    one). `roofline`: as a share of what a program of so many FLOPs for each byte can
    reach at best (Williams et al. 2009), by the measured peaks.
    """
    if not cost["flops"] or not cost["bytes"]:
        return {"mfu": None, "roofline": None}
    speed = cost["flops"] / seconds
    best = min(peak["flops"], cost["flops"] / cost["bytes"] * peak["bytes"])
    most = peak["datasheet"] or peak["flops"]
    return {"mfu": speed / most, "roofline": speed / best}
