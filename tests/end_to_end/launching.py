"""Starts the command line of `ccu_jax` in new processes."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Smaller than `tiny`, with a checkpoint after every second step.
SMALL_CONFIG = """
from ccu_jax.config import CcuPlus, Config, Data, Model, Run, Train

config = Config(
    name="small",
    data=Data(dataset="pairs", image_size=8, text_length=6, vocabulary=120),
    model=Model(patch=4, image_width=8, image_depth=1, text_width=8, text_depth=1,
                heads=2, embed_dim=4),
    train=Train(epochs=1, batch=64, shift=1),
    ccu_plus=CcuPlus(steps=8, batch=32, unlearn_batch=16, refresh_every=4),
    run=Run(steps_per_call=2, checkpoint_steps=2),
    methods=("original", "retrain_visual", "ccu_plus"),
)
"""


def run_environment(**variables: str) -> dict[str, str]:
    """Returns this process's environment without simulated devices.

    Warnings are errors, and every compiled program is cached.
    """
    env = dict(os.environ)
    for name in ("NPROC", "PYTEST_CURRENT_TEST"):
        env.pop(name, None)
    flags = env["XLA_FLAGS"].split()
    env["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    env |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return env | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables


def start_process(*argv: object, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*map(str, argv)],
        env=run_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_command(*argv: object) -> subprocess.Popen:
    return start_process(sys.executable, "-m", "ccu_jax.launch", *argv)


def communicate(process: subprocess.Popen, timeout_s: float = 400) -> tuple[str, str]:
    """Waits for the end of a process; returns what it printed to stdout and stderr."""
    try:
        return process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Waits until the condition holds while all processes run."""
    end_s = time.monotonic() + 200
    while not condition():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end_s
        time.sleep(0.02)


def find_free_address() -> str:
    """Returns an unused address for two processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_command(*argv: object) -> str:
    """Runs the command, which must succeed with an empty stderr; returns stdout."""
    process = start_command(*argv)
    out, err = communicate(process)
    assert (process.returncode, err) == (0, ""), err[-2000:]
    return out


def fail_command(*argv: object) -> str:
    """Runs the command, which must fail with one line on stderr; returns it."""
    process = start_command(*argv)
    _, err = communicate(process)
    assert process.returncode == 2 and err.count("\n") == 1, err
    return err
