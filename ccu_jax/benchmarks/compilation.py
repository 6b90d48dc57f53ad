"""`python -m ccu_jax.benchmarks compile`: seconds to the first unlearning step.

Runs the command line in child processes: the original is trained, then one method
unlearns without and with compiled programs in the cache.
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

from rich.table import Table

from ccu_jax.benchmarks.harness import summarize
from ccu_jax.config.loading import available_configs
from ccu_jax.errors import UserError

HELP = "seconds to the first unlearning step, with and without compiled programs"
METHOD = "ccu_plus"
# Compilation depends neither on the number of rows nor on that of epochs.
_SETTINGS = ("train.epochs=1", "data.records=False", "data.sample_rows=600")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.add_argument(
        "--configs",
        metavar="A,B",
        default=",".join(available_configs()),
        help="default all",
    )
    parser.add_argument(
        "--windows", metavar="N", type=int, default=3, help="warm starts; default 3"
    )


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError on flags that cannot be measured."""
    for name in flags.configs.split(","):
        if name not in available_configs():
            names = ", ".join(available_configs())
            raise UserError(f"--configs: unknown config {name!r}; choose from {names}")
    if flags.windows < 1:
        raise UserError("--windows: must be at least 1")


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Starts every configuration: original, cold unlearning, warm unlearning."""
    results = []
    for config in flags.configs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            print(f"{config}: training the original", file=sys.stderr, flush=True)
            start_run(config, workdir, "original")
            cold = start_run(config, workdir, f"original,{METHOD}")
            warm = []
            for _ in range(flags.windows):
                _remove_stage(workdir)
                warm.append(start_run(config, workdir, f"original,{METHOD}"))
        results.append(
            {
                "config": config,
                "cold": cold,
                "warm": {
                    name: summarize([run[name] for run in warm]) for name in warm[0]
                },
            }
        )
    return {"configs": results}


def start_run(config: str, workdir: pathlib.Path, methods: str) -> dict[str, float]:
    """Runs the command and returns seconds from its start, by its event log.

    Raises:
        UserError: the run failed; quotes the end of its stderr.
    """
    command = [sys.executable, "-m", "ccu_jax.launch", "--config", config]
    command += ["--workdir", str(workdir), "--methods", methods]
    for setting in _SETTINGS:
        command += ["--set", setting]
    # The cache beside the working folder, not one of the environment.
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    events = workdir / "events.jsonl"
    offset = events.stat().st_size if events.exists() else 0
    start = time.time()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.time() - start
    if done.returncode:
        raise UserError(f"{config}: the run failed: {done.stderr.strip()[-300:]}")
    with events.open("rb") as file:
        file.seek(offset)
        records = [json.loads(line) for line in file.read().splitlines()]
    return {"seconds": seconds, **_split_seconds(records, start, workdir)}


def _split_seconds(
    events: list[dict[str, Any]], start: float, workdir: pathlib.Path
) -> dict[str, float]:
    def seconds_at(kind: str, title: str) -> float | None:
        times = [
            datetime.fromisoformat(event["time"]).timestamp() - start
            for event in events
            if event["kind"] == kind and event.get("title", "").endswith(title)
        ]
        return times[0] if times else None

    seconds = {
        "imports_s": seconds_at("stage_start", "data"),
        "data_s": seconds_at("stage_end", "data"),
    }
    end = seconds_at("stage_end", METHOD)
    if end is not None:
        path = workdir / "stages" / f"{METHOD}-0.json"
        clocks = json.loads(path.read_text("utf-8"))["seconds"]
        seconds |= {
            "unlearning_s": seconds_at("stage_start", METHOD),
            "compile_s": clocks["compile"],
            "start_s": clocks["start"],
            # All steps are one call. The few milliseconds of saving count as well.
            "first_step_s": end - clocks["steps"] - clocks["evaluate"],
        }
    return {name: value for name, value in seconds.items() if value is not None}


def _remove_stage(workdir: pathlib.Path) -> None:
    (workdir / "stages" / f"{METHOD}-0.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / f"{METHOD}-0")


def tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the table of seconds from the start of the command."""
    names = ("imports_s", "data_s", "unlearning_s", "compile_s", "start_s")
    names += ("first_step_s", "seconds")
    header = ("config", "start", "imported", "data ready", "unlearning begins")
    header += ("compiling", "method start", "first step", "end")
    table = Table(*header, title=f"{METHOD}: seconds from the start of the command")
    for result in measured["configs"]:
        warm = {name: result["warm"][name]["median"] for name in names}
        for label, seconds in (("cold", result["cold"]), ("warm", warm)):
            row = (f"{seconds[name]:.2f}" for name in names)
            table.add_row(result["config"], label, *row)
    return [table]
