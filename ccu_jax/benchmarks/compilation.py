"""`python -m ccu_jax.benchmarks compile`: how long until work begins, cold and warm.

The real command line, in child processes: the original is trained, then one method
unlearns with nothing compiled for it, then it does so once more from the same folder
and the same cache of compiled programs.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from typing import Any

from ccu_jax.config.loading import available_configs
from ccu_jax.errors import UserError

HELP = "seconds until the first unlearning step, without and with compiled programs"
METHOD = "ccu_plus"
_MOST_S = 15.0  # from the command to the first unlearning step, at a second start
# Few rows and one round: what is compiled depends on neither.
_SMALL = ("train.epochs=1", "data.records=False", "data.sample_rows=600")


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument(
        "--configs",
        metavar="A,B",
        default=",".join(available_configs()),
        help="default all",
    )
    parser.add_argument(
        "--windows", metavar="N", type=int, default=3, help="second starts; default 3"
    )


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        UserError: which flag, and what it may be.
    """
    for name in given.configs.split(","):
        if name not in (known := available_configs()):
            raise UserError(f"--configs: {name!r} is none of {', '.join(known)}")
    if given.windows < 1:
        raise UserError("--windows: must be 1 or more")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Starts every configuration: original, first and further unlearning."""
    found = []
    for config in given.configs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            print(f"{config}: training its original", flush=True)
            start(config, workdir, "original")
            cold = start(config, workdir, f"original,{METHOD}")
            warm = []
            for _ in range(given.windows):
                _forget(workdir)
                warm.append(start(config, workdir, f"original,{METHOD}"))
            first = sorted(run["first_step_s"] for run in warm)
            found.append(
                {"config": config, "cold": cold, "warm": warm, "sorted": first}
            )
    return {"configs": found}


def start(config: str, workdir: pathlib.Path, methods: str) -> dict[str, Any]:
    """Runs the command; gives seconds from its start, by the events that it wrote.

    Raises:
        UserError: it failed; its own words are given.
    """
    command = [sys.executable, "-m", "ccu_jax.launch", "--config", config]
    command += ["--workdir", str(workdir), "--methods", methods]
    for setting in _SMALL:
        command += ["--set", setting]
    # The cache beside the folder and no other.
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    events = workdir / "events.jsonl"
    before = events.stat().st_size if events.exists() else 0
    began = time.time()
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    took = time.time() - began
    if done.returncode:
        raise UserError(f"{config}: the run failed: {done.stderr.strip()[-300:]}")
    with events.open("rb") as file:
        file.seek(before)
        told = [json.loads(line) for line in file.read().splitlines()]
    return {"seconds": took, **_moments(told, began, workdir)}


def _moments(told, began, workdir):
    """When what happened: the stage's own clocks say what came after the first step."""

    def at(kind, title):
        times = [
            datetime.fromisoformat(event["time"]).timestamp() - began
            for event in told
            if event["kind"] == kind and event.get("title", "").endswith(title)
        ]
        return times[0] if times else None

    moments = {
        "imports_s": at("stage_start", "data"),
        "data_s": at("stage_end", "data"),
    }
    entered, left = at("stage_start", METHOD), at("stage_end", METHOD)
    if left is None:
        return moments
    row = json.loads((workdir / "stages" / f"{METHOD}-0.json").read_text("utf-8"))
    clocks = row["seconds"]
    # All steps are one call: the first one begins when the call does. Saving comes
    # after it as well, so that what is told is a little too long.
    return {
        **moments,
        "unlearning_s": entered,
        "compile_s": clocks["compile"],
        "start_s": clocks["start"],
        "first_step_s": left - clocks["steps"] - clocks["evaluate"],
    }


def _forget(workdir):
    """Leave the folder as it was before the method ran; the compiled programs stay."""
    (workdir / "stages" / f"{METHOD}-0.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / f"{METHOD}-0")


def targets(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The promise, for every configuration."""
    return [
        {
            "name": f"{of['config']}: second start, to the first unlearning step",
            "value": of["sorted"][len(of["sorted"]) // 2],
            "sign": "<=",
            "bound": _MOST_S,
            "unit": "s",
        }
        for of in measured["configs"]
    ]


def tables(measured: dict[str, Any]) -> list[tuple]:
    """Seconds from the command, cold and (medians) warm."""
    header = ("config", "start", "imports", "data ready", "unlearning entered")
    lines = []
    for of in measured["configs"]:
        warm = sorted(of["warm"], key=lambda run: run["first_step_s"])
        for name, run in (("first", of["cold"]), ("second", warm[len(warm) // 2])):
            names = ("imports_s", "data_s", "unlearning_s", "compile_s", "first_step_s")
            lines.append(
                (of["config"], name, *(f"{run[key]:.1f}" for key in names)),
            )
    notes = [
        f"{METHOD} on a finished original; compile is a part of what lies before",
        f"smaller than the configuration: {', '.join(_SMALL)}",
    ]
    columns = (*header, "compile", "first step")
    return [("seconds from the command", columns, lines, notes)]
