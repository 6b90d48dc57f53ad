"""What every case of a fault is given: folders, chance, and undisturbed runs."""

import dataclasses
import functools
import pathlib
import random
import shutil
import time

from ccu_jax.runs import results as rows
from tests.end_to_end.launching import SMALL_CONFIG
from tests.faults import same as faults_same
from tests.faults.runs import Run, Start, events, starts

_REQUESTS = ("--set", "unlearn.num_requests=3")
_ONE = ("--methods", "ccu_plus")
_POOL = ("--audit", "rigorous", "--shadows", "6")
# Enough for two processes, who wait for each other at every array.
SHORT = (*_ONE, "--set", "train.batch=256")


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to; `stages`: what it did for how many seconds."""

    workdir: pathlib.Path
    results: dict[str, object]
    seconds: float
    stages: dict[str, float]


class World:
    """The folder of all cases, and what they share.

    `audited`, `whole`, `streamed`: the flags of runs; `quick`: of fewer stages, with
    fewer faults each, as the tests take them.
    """

    def __init__(self, folder: pathlib.Path, quick: bool = False):
        self.quick = quick
        # All stages there are; and streaming, which the last tier of the audit refuses.
        self.audited = _ONE if quick else _POOL
        self.whole = (*self.audited, "--purge")
        self.streamed = (*_REQUESTS, *(_ONE if quick else ("--audit", "standard")))
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "config.py"
        if not self.config.exists():
            self.config.write_text(SMALL_CONFIG)

    def argv(self, workdir, *more) -> list[str]:
        return ["--config", str(self.config), "--workdir", str(workdir), *more]

    @functools.cache  # noqa: B019  there is one world
    def undisturbed(self, *more: str, hosts: int = 1) -> Undisturbed:
        """A run with these flags; made once, and kept for the next command."""
        name = f"{hosts}-" + "_".join(x.strip("-").replace("/", "") for x in more)
        # Of another commit it would tell of what has changed since.
        workdir = self.folder / "undisturbed" / str(rows.source_commit()) / name
        if not (workdir.with_suffix(".done")).exists():
            for _ in range(1 if self.quick else 2):  # all is compiled by the second
                shutil.rmtree(workdir, ignore_errors=True)
                workdir.parent.mkdir(parents=True, exist_ok=True)
                log = workdir.with_suffix(".log")
                run = Run(self.argv(workdir, *more), log, Start(hosts))
                assert run.wait() == 0, run.errors()
            seconds = time.monotonic() - run.began
            workdir.with_suffix(".done").write_text(f"{seconds}\n")
        seconds = float(workdir.with_suffix(".done").read_text())
        stages = {
            event["title"].removeprefix("seed 0: "): event["seconds"]
            for event in events(workdir)
            if event["kind"] == "stage_end"
        }
        return Undisturbed(workdir, faults_same.results(workdir), seconds, stages)


class Case:
    """One case: its own folder and chance; what was done to it is noted."""

    def __init__(self, world: World, kind: str, number: int):
        self.world, self.number = world, number
        self.draw = random.Random(f"{kind}/{number}")
        self.folder = world.folder / "cases" / f"{kind}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.workdir = self.folder / "run"
        self.faults: list[str] = []  # what was hit, one for each fault
        self.starts = 0

    def start(self, *more, how: Start = Start(), workdir=None) -> Run:  # noqa: B008
        """Starts the command in the case's folder."""
        self.starts += 1
        argv = self.world.argv(workdir or self.workdir, *more)
        before = starts(self.workdir)
        run = Run(argv, self.folder / f"start-{self.starts}.log", how)
        run.before = before
        return run

    def many(self, low: int, high: int) -> int:
        """A number of faults of one run."""
        return 1 if self.world.quick else self.draw.randint(low, high)

    def copied(self, undisturbed: Undisturbed) -> None:
        """Begins with what an undisturbed run has left."""
        self.copied_from(undisturbed.workdir)

    def copied_from(self, folder: pathlib.Path) -> None:
        """Begins with what is in a folder."""
        shutil.copytree(folder, self.workdir, symlinks=True)

    def ends_like(self, undisturbed: Undisturbed, *more, how: Start = Start()) -> None:  # noqa: B008
        """The same command once more comes to its end, with the undisturbed bits."""
        run = self.start(*more, how=how)
        assert run.wait() == 0, f"exit code {run.code()}: {run.errors()[-1500:]}"
        if how.hosts == 1:
            assert run.errors() == "", run.errors()[-1500:]
        self.same(undisturbed)

    def same(self, undisturbed: Undisturbed) -> None:
        """The results are the undisturbed ones."""
        mine = faults_same.results(self.workdir)
        wrong = faults_same.differences(undisturbed.results, mine)
        assert not wrong, f"other results than undisturbed: {', '.join(wrong)}"


def one_line(run: Run, code: int, *words: str) -> str:
    """A run that has ended with this code and one line of an error; gives the line."""
    told = run.errors()
    assert run.code() == code, f"exit code {run.code()}: {told[-1500:]}"
    assert "Traceback" not in told, told[-1500:]
    lines = [line for line in told.splitlines() if line.strip()]
    assert len(lines) == 1, f"{len(lines)} lines: {told[-1500:]}"
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]
