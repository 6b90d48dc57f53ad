"""Starting runs that are to be disturbed: quickly, really, or as two processes.

A real start costs seconds of importing. So most runs are forked off one process that
has imported all and has begun nothing: no backend, no threads, no files.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

from tests.end_to_end.launching import ROOT, run_environment

HEAVY = ("jax", "orbax.checkpoint", "scipy.stats", "matplotlib.figure", "tokenizers")
WAIT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run is started.

    `hosts`: number of processes. `real`: by its own interpreter. `before`: a shell's
    words in front of it, as `unshare -rm sh -c ... --`.
    """

    hosts: int = 1
    real: bool = False
    before: tuple[str, ...] = ()


class Run:
    """One start of the command, which writes to `log`."""

    def __init__(self, argv, log: pathlib.Path, how: Start = Start()):  # noqa: B008
        self.log, self.how = log, how
        self._argv = [str(arg) for arg in argv]
        self.began = time.monotonic()
        self.before = 0  # starts of others on the same folder
        if how.hosts > 1:
            self._process = _together(self._argv, log, how)
        elif how.real or how.before:
            command = [sys.executable, "-m", "ccu_jax.launch", *self._argv]
            self._process = _shell([*how.before, *command], log)
        else:
            self._process = context().Process(
                target=_forked, args=(self._argv, log, _environment())
            )
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the process that was started (of several: to the shell)."""
        os.kill(self.pid, number)

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, seconds: float = WAIT_S) -> int:
        """The exit code; fails where it takes longer."""
        end = time.monotonic() + seconds
        while self.code() is None:
            if time.monotonic() > end:
                self.destroy()
                raise AssertionError(f"no end after {seconds:.0f} s: {self.tail()}")
            time.sleep(0.01)
        return self.code()

    def destroy(self) -> None:
        """Kills it, and whatever it has started."""
        for pid in [*self.peers(), self.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        while self.code() is None:
            time.sleep(0.01)

    def peers(self) -> list[int]:
        """The processes of a run of several, in their order."""
        found = {}
        children = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            started = [int(pid) for pid in children.read_text().split()]
        except OSError:  # it has ended
            return []
        for pid in started:
            words = _command(pid)
            if "--multihost" in words:
                found[int(words[words.index("--multihost") + 3])] = pid
        return [found[index] for index in sorted(found)]

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def tail(self) -> str:
        return self.text()[-1500:]

    def errors(self) -> str:
        """What it has printed to stderr."""
        path = _errors(self.log)
        return path.read_text("utf-8", "replace") if path.exists() else ""


def _command(pid) -> list[str]:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _errors(log):
    return log.with_suffix(".err")


@functools.cache
def context():
    """The process that all quick runs are forked from."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.faults.zygote"])
    mine, theirs = dict(os.environ), _environment()
    theirs["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")  # the preloaded lie there
    try:
        os.environ.clear()
        os.environ.update(theirs)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(mine)
    return made


def _environment():
    # One thread of BLAS in all: it is fork's friend, and the same for every start.
    return run_environment(OPENBLAS_NUM_THREADS="1", CCU_FAULTS="1")


def _forked(argv, log, environment):
    """In the child: becomes the command."""
    os.setsid()
    # Python imports the parent's main program here first, which may set some.
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, log), (2, _errors(log))):
        to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(to, number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["launch", *argv]
    from ccu_jax import launch

    launch.run_process()


def _shell(command, log, **more):
    with log.open("wb") as out, _errors(log).open("wb") as err:
        return subprocess.Popen(
            command,
            env=_environment() | more,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def _together(argv, log, how):
    command = ["bash", str(ROOT / "launch/local.sh"), str(how.hosts), "1", *argv]
    return _shell([*how.before, *command], log, VIRTUAL_ENV=sys.prefix)


def events(workdir) -> list[dict]:
    """The events of all starts; a line that a kill has cut off is none."""
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


def starts(workdir) -> int:
    """How many starts have told what they plan."""
    return sum(event["kind"] == "plan" for event in events(workdir))


def where(workdir) -> str:
    """Which stage is being worked on, as exactly as the folder tells."""
    last = "start"
    for event in events(workdir):
        if event["kind"] == "plan":
            last = "start"
        elif event["kind"] == "stage_start":
            last = event["title"].removeprefix("seed 0: ")
        elif event["kind"] == "stage_end" and not event["failure"]:
            last = "between stages"
    folder = workdir / "checkpoints" / f"{last}-0"
    if last == "audit":
        return "audit: shadows" if (workdir / "shadows").exists() else "audit: models"
    if (workdir / "checkpoints" / "original-0" / "features.new").exists():
        return "feature store"
    if list(folder.glob("params/[0-9]*")):
        return f"{last}: evaluation"
    return last
