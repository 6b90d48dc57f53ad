"""Starts runs that are to be disturbed, as one process or several."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests.end_to_end.launching import ROOT, run_environment

TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run is started.

    `hosts`: number of processes, by `launch/local.sh`. `prefix`: words of a shell in
    front of the command, such as `unshare -rm sh -c ... --`.
    """

    hosts: int = 1
    prefix: tuple[str, ...] = ()


class Run:
    """One start of the command, which writes to `log`."""

    def __init__(self, argv, log: pathlib.Path, how: Start = Start()):
        self.log, self._err = log, log.with_suffix(".err")
        self.began = time.monotonic()
        self.num_starts_before = 0  # of others in the same folder
        command = [sys.executable, "-m", "ccu_jax.launch"]
        if how.hosts > 1:
            command = ["bash", str(ROOT / "launch/local.sh"), str(how.hosts), "1"]
        # One thread for BLAS, so that all starts give the same bits.
        env = run_environment(OPENBLAS_NUM_THREADS="1", VIRTUAL_ENV=sys.prefix)
        with log.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*how.prefix, *command, *map(str, argv)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the started process (to the shell of several)."""
        os.kill(self.pid, number)

    def code(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Returns the exit code; fails after the timeout."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.destroy()
            raise AssertionError(f"ran {timeout_s:.0f} s: {self.tail()}") from None

    def destroy(self) -> None:
        """Kills the run and the processes that it has started."""
        for pid in [*self.peers(), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def peers(self) -> list[int]:
        """Returns the process ids of a run of several processes, in order."""
        found = {}
        try:
            children = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children")
            for pid in map(int, children.read_text().split()):
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "--multihost" in words:
                    found[int(words[words.index("--multihost") + 3])] = pid
        except OSError:  # it has ended
            return []
        return [found[index] for index in sorted(found)]

    def text(self) -> str:
        """Returns what it has printed so far."""
        return self.log.read_text("utf-8", "replace")

    def tail(self) -> str:
        """Returns the end of what it has printed."""
        return self.text()[-1500:]

    def errors(self) -> str:
        """Returns what it has printed to stderr."""
        return self._err.read_text("utf-8", "replace")


def read_events(workdir: pathlib.Path) -> list[dict]:
    """Returns the events of all starts, without a line that a kill cut off."""
    found = []
    try:
        lines = (workdir / "events.jsonl").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def count_starts(workdir: pathlib.Path) -> int:
    """Returns how many starts have logged their plan."""
    return sum(event["kind"] == "plan" for event in read_events(workdir))


def current_stage(workdir: pathlib.Path) -> str:
    """Returns the stage that runs, as exactly as the folder shows."""
    last = "start"
    for event in read_events(workdir):
        if event["kind"] == "plan":
            last = "start"
        elif event["kind"] == "stage_start":
            last = event["title"].removeprefix("seed 0: ")
        elif event["kind"] == "stage_end" and not event["failure"]:
            last = "between stages"
    if last == "audit":
        return "audit: shadows" if (workdir / "shadows").exists() else "audit: models"
    if (workdir / "checkpoints" / "original-0" / "features.new").exists():
        return "feature store"
    if list((workdir / "checkpoints" / f"{last}-0").glob("params/[0-9]*")):
        return f"{last}: evaluation"
    return last
