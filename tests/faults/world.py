"""What the cases of all faults share: folders, random choices, undisturbed runs."""

import dataclasses
import functools
import pathlib
import random
import shutil
import time

from ccu_jax.runs.results import source_commit
from tests.end_to_end.launching import SMALL_CONFIG
from tests.faults import same
from tests.faults.runs import Run, Start, count_starts, read_events

_CCU_PLUS = ("--methods", "ccu_plus")
# Few steps: two processes wait for each other at every array.
SHORT = (*_CCU_PLUS, "--set", "train.batch=256")


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run without faults; `stages`: the seconds of each stage."""

    workdir: pathlib.Path
    results: dict[str, object]
    seconds: float
    stages: dict[str, float]


class World:
    """The folder of all cases, and the flags of their runs.

    `audited`, `purged`, `streamed`: flags; `is_quick`: fewer stages and faults, for the
    tests.
    """

    def __init__(self, folder: pathlib.Path, is_quick: bool = False):
        self.is_quick = is_quick
        pool = ("--audit", "rigorous", "--shadows", "6")
        self.audited = _CCU_PLUS if is_quick else pool
        self.purged = (*self.audited, "--purge")
        audit = _CCU_PLUS if is_quick else ("--audit", "standard")
        self.streamed = ("--set", "unlearn.num_requests=3", *audit)
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "config.py"
        if not self.config.exists():
            self.config.write_text(SMALL_CONFIG)

    def argv(self, workdir, *flags) -> list[str]:
        return ["--config", str(self.config), "--workdir", str(workdir), *flags]

    @functools.cache  # noqa: B019  there is one world
    def undisturbed(self, *flags: str, hosts: int = 1) -> Undisturbed:
        """Returns a run with these flags, made once per commit."""
        name = f"{hosts}-" + "_".join(x.strip("-").replace("/", "") for x in flags)
        workdir = self.folder / "undisturbed" / str(source_commit()) / name
        done = workdir.with_suffix(".done")
        if not done.exists():
            seconds = 0.0
            for _ in range(1 if self.is_quick else 2):  # the second compiles nothing
                shutil.rmtree(workdir, ignore_errors=True)
                workdir.parent.mkdir(parents=True, exist_ok=True)
                log = workdir.with_suffix(".log")
                run = Run(self.argv(workdir, *flags), log, Start(hosts))
                assert run.wait() == 0, run.errors()
                seconds = time.monotonic() - run.began
            done.write_text(f"{seconds}\n")
        stages = {
            event["title"].removeprefix("seed 0: "): event["seconds"]
            for event in read_events(workdir)
            if event["kind"] == "stage_end"
        }
        seconds = float(done.read_text())
        return Undisturbed(workdir, same.load_results(workdir), seconds, stages)


class Case:
    """One case: its folder, its random choices, and the faults that were made."""

    def __init__(self, world: World, kind: str, number: int):
        self.world, self.number = world, number
        self.rng = random.Random(f"{kind}/{number}")
        self.folder = world.folder / "cases" / f"{kind}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.workdir = self.folder / "run"
        self.faults: list[str] = []
        self.num_starts = 0

    def start(self, *flags, how: Start = Start()) -> Run:  # noqa: B008
        """Starts the command in the case's folder."""
        self.num_starts += 1
        before = count_starts(self.workdir)
        log = self.folder / f"start-{self.num_starts}.log"
        run = Run(self.world.argv(self.workdir, *flags), log, how)
        run.num_starts_before = before
        return run

    def num_faults(self, low: int, high: int) -> int:
        """Returns how many faults to make in a run."""
        return 1 if self.world.is_quick else self.rng.randint(low, high)

    def copy_from(self, folder: pathlib.Path) -> None:
        """Starts from the content of a folder."""
        shutil.copytree(folder, self.workdir, symlinks=True)

    def assert_resumes(self, undisturbed: Undisturbed, *flags, how: Start = Start()):  # noqa: B008
        """Runs the same command again, which must end with the undisturbed bits."""
        run = self.start(*flags, how=how)
        assert run.wait() == 0, f"exit code {run.code()}: {run.errors()[-1500:]}"
        if how.hosts == 1:
            assert run.errors() == "", run.errors()[-1500:]
        self.assert_same(undisturbed)

    def assert_same(self, undisturbed: Undisturbed) -> None:
        """Fails if the results differ from the undisturbed ones."""
        results = same.load_results(self.workdir)
        different = same.differences(undisturbed.results, results)
        assert not different, f"results differ: {', '.join(different)}"


def assert_one_line(run: Run, code: int, *words: str) -> None:
    """Fails unless the run ended with this code and a one-line error of these words."""
    printed = run.errors()
    assert run.code() == code, f"exit code {run.code()}: {printed[-1500:]}"
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 1, f"{len(lines)} lines: {printed[-1500:]}"
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
