"""Starts the command line of `ccu_jax` in a process of its own."""

import os
import pathlib
import subprocess
import sys

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
    env |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return env | variables


def start_command(*argv: object, **variables: str) -> subprocess.Popen:
    """Starts the command with these flags and environment variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "ccu_jax.launch", *map(str, argv)],
        env=run_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*argv: object, **variables: str) -> str:
    """Runs the command, which must succeed without a word on stderr; returns stdout."""
    process = start_command(*argv, **variables)
    out, err = process.communicate(timeout=400)
    assert (process.returncode, err) == (0, ""), err[-2000:]
    return out


def fail_command(*argv: object, code: int = 2) -> str:
    """Runs the command, which must fail with one line on stderr; returns it."""
    process = start_command(*argv)
    _, err = process.communicate(timeout=400)
    assert process.returncode == code and err.count("\n") == 1, err
    return err
