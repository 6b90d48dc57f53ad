"""Starts runs to be disturbed, and reads the events that they log."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.end_to_end.launching import ROOT, run_environment

TIMEOUT_S = 300.0


class Run:
    """One process of the command, with its output in `log`.

    If `hosts` is above 1, `launch/local.sh` starts that many. `prefix` is prepended to
    the command, such as `unshare --mount sh -c SCRIPT`.
    """

    def __init__(self, argv: Sequence[str], log: pathlib.Path, hosts=1, prefix=()):
        self._log, self._err = log, log.with_suffix(".err")
        self.start_s = time.monotonic()
        self.num_earlier_starts = 0  # in the same folder
        command = [sys.executable, "-m", "ccu_jax.launch"]
        if hosts > 1:
            command = ["bash", str(ROOT / "launch/local.sh"), str(hosts), "1"]
        # One thread for BLAS, so that all starts give bitwise equal results.
        env = run_environment(OPENBLAS_NUM_THREADS="1", VIRTUAL_ENV=sys.prefix)
        with log.open("wb") as out, self._err.open("wb") as err:
            options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            options |= {"env": env, "start_new_session": True}
            command = [*prefix, *command, *map(str, argv)]
            self._process = subprocess.Popen(command, **options)
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for the end and returns the exit code; fails after the timeout."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            message = f"still running after {timeout_s:.0f} s: {self.errors()}"
            raise AssertionError(message) from None

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds or the run has ended."""
        while self.exit_code() is None and not condition():
            time.sleep(0.002)

    def sleep(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= end_s)

    def kill(self) -> None:
        for pid in {*self.host_pids(), self.pid}:
            send_signal(pid, signal.SIGKILL)
        self._process.wait()

    def host_pids(self) -> list[int]:
        """Returns the process ids of the hosts of `launch/local.sh`, in order."""
        pids = {}
        with contextlib.suppress(OSError):  # a process has ended
            children = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children")
            for pid in map(int, children.read_text().split()):
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "--multihost" in words:
                    pids[int(words[words.index("--multihost") + 3])] = pid
        return [pids[index] for index in sorted(pids)]

    def output(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def errors(self) -> str:
        return self._err.read_text("utf-8", "replace")


def send_signal(pid: int, number: int) -> None:
    """Sends a signal to a process, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def read_events(workdir: pathlib.Path) -> list[dict]:
    """Returns the events of all starts, without incomplete lines."""
    try:
        lines = (workdir / "events.jsonl").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def count_starts(workdir: pathlib.Path) -> int:
    """Returns the number of starts that have logged their plan."""
    return sum(event["kind"] == "plan" for event in read_events(workdir))


def find_stage(workdir: pathlib.Path) -> str:
    """Returns the running stage, inferred from the events and files of a folder."""
    stage = "start"
    for event in read_events(workdir):
        if event["kind"] == "plan":
            stage = "start"
        elif event["kind"] == "stage_start":
            stage = event["title"].removeprefix("seed 0: ")
        elif event["kind"] == "stage_end" and not event["failure"]:
            stage = "between stages"
    if stage == "audit":
        return "audit: shadows" if (workdir / "shadows").exists() else "audit: models"
    if (workdir / "checkpoints" / "original-0" / "features.new").exists():
        return "feature store"
    if list((workdir / "checkpoints" / f"{stage}-0").glob("params/[0-9]*")):
        return f"{stage}: evaluation"
    return stage


def is_in_last_stage(workdir: pathlib.Path) -> bool:
    """Returns whether the last stage has begun, so that the run may end normally."""
    last_title, has_begun = None, False
    for event in read_events(workdir):
        if event["kind"] == "plan":
            last_title, has_begun = event["stages"][-1], False
        has_begun |= event["kind"] == "stage_start" and event["title"] == last_title
    return has_begun
