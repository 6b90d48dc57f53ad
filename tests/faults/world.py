"""Cases of fault injection, and the undisturbed runs that they are compared with."""

import functools
import pathlib
import random
import shutil
import signal
import time
from typing import NamedTuple

from ccu_jax.runs.results import source_commit
from tests.end_to_end.launching import SMALL_CONFIG
from tests.faults import comparison
from tests.faults.runs import Run, count_starts, find_stage, read_events, send_signal

METHOD_FLAGS = ("--methods", "ccu_plus")
# Few steps, because two processes synchronize at every array.
HOST_FLAGS = (*METHOD_FLAGS, "--set", "train.batch=256")


class Undisturbed(NamedTuple):
    """A run without faults; `stages_s` has the wall time of each stage."""

    workdir: pathlib.Path
    results: dict[str, object]
    seconds: float
    stages_s: dict[str, float]


class World:
    """The folder of all cases, and the flags of their runs.

    `is_quick` selects flags with fewer stages, and fewer faults per case, for tests.
    """

    def __init__(self, folder: pathlib.Path, is_quick: bool = False):
        self.is_quick = is_quick
        rigorous, standard = "--audit rigorous --shadows 6", "--audit standard"
        self.audit_flags = METHOD_FLAGS if is_quick else tuple(rigorous.split())
        self.purge_flags = (*self.audit_flags, "--purge")
        audit = METHOD_FLAGS if is_quick else tuple(standard.split())
        self.stream_flags = ("--set", "unlearn.num_requests=3", *audit)
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "config.py"
        if not self.config.exists():
            self.config.write_text(SMALL_CONFIG)

    def argv(self, workdir: pathlib.Path, *flags: str) -> list[str]:
        return ["--config", str(self.config), "--workdir", str(workdir), *flags]

    @functools.cache  # noqa: B019  there is one world
    def run_undisturbed(self, *flags: str, hosts: int = 1) -> Undisturbed:
        """Returns an undisturbed run with these flags, executed once per commit."""
        name = f"{hosts}-" + "_".join(x.strip("-").replace("/", "") for x in flags)
        workdir = self.folder / "undisturbed" / str(source_commit()) / name
        done = workdir.with_suffix(".done")
        if not done.exists():
            seconds = 0.0
            for _ in range(1 if self.is_quick else 2):  # the second compiles nothing
                shutil.rmtree(workdir, ignore_errors=True)
                workdir.parent.mkdir(parents=True, exist_ok=True)
                argv, log = self.argv(workdir, *flags), workdir.with_suffix(".log")
                run = Run(argv, log, hosts)
                assert run.wait() == 0, run.errors()
                seconds = time.monotonic() - run.start_s
            done.write_text(f"{seconds}\n")
        stages_s = {
            event["title"].removeprefix("seed 0: "): event["seconds"]
            for event in read_events(workdir)
            if event["kind"] == "stage_end"
        }
        results, seconds = comparison.load_results(workdir), float(done.read_text())
        return Undisturbed(workdir, results, seconds, stages_s)

    def kill_at_file(
        self, flags: tuple[str, ...], pattern: str, name: str = "plain"
    ) -> pathlib.Path:
        """Returns the folder of a run killed as soon as a file matched `pattern`."""
        parts = [*flags, name.replace(" ", "-")]
        folder = self.folder / "killed" / "_".join(x.strip("-") for x in parts)
        if folder.exists():
            return folder
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        run = Run(self.argv(new, *flags), folder.with_suffix(".log"))
        run.wait_until(lambda: list(new.glob(pattern)))
        send_signal(run.pid, signal.SIGKILL)
        assert run.wait(20) == -signal.SIGKILL, f"{pattern} missing: {run.errors()}"
        new.rename(folder)
        return folder


class Case:
    """One case: its folder, its random generator, and the injected faults."""

    def __init__(self, world: World, kind: str, number: int):
        self.world, self.number = world, number
        self.rng = random.Random(f"{kind}/{number}")
        self.folder = world.folder / "cases" / f"{kind}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.workdir = self.folder / "run"
        self.faults: list[str] = []
        self.num_starts = 0

    def start(self, *flags: str, hosts: int = 1, prefix: tuple[str, ...] = ()) -> Run:
        self.num_starts += 1
        num_earlier_starts = count_starts(self.workdir)
        log = self.folder / f"start-{self.num_starts}.log"
        run = Run(self.world.argv(self.workdir, *flags), log, hosts, prefix)
        run.num_earlier_starts = num_earlier_starts
        return run

    def copy_from(self, folder: pathlib.Path) -> None:
        shutil.copytree(folder, self.workdir, symlinks=True)

    def has_planned(self, run: Run, workdir: pathlib.Path | None = None) -> bool:
        """Returns whether the start `run` has logged its plan."""
        return count_starts(workdir or self.workdir) > run.num_earlier_starts

    def wait_for_moment(
        self, run: Run, undisturbed: Undisturbed, workdir: pathlib.Path | None = None
    ) -> None:
        """Waits until a random moment of the run or of one of its unfinished stages.

        `workdir` is the folder's path in this process, if it differs from the run's.
        """
        rng, workdir = self.rng, workdir or self.workdir
        if rng.random() < 0.3:
            return run.sleep(rng.uniform(0, 0.6 * undisturbed.seconds))
        finished = {
            event["title"].removeprefix("seed 0: ")
            for event in read_events(workdir)
            if event["kind"] == "stage_end" and event["title"] not in ("data", "report")
        }
        stages = [name for name in undisturbed.stages_s if name not in finished]
        if count_starts(workdir):
            stages.remove("data")  # takes no time once it is prepared
        # Mostly one of the next stages, so that a run is hit often.
        target = stages[min(int(rng.expovariate(1)), len(stages) - 1)]
        if rng.random() < 0.2:
            target = rng.choice(["feature store", "evaluation"])

        def is_in_target() -> bool:
            stage = find_stage(workdir)
            is_target = stage.partition(":")[0] == target or stage.endswith(target)
            return is_target and self.has_planned(run, workdir)

        run.wait_until(is_in_target)
        # Longer than undisturbed, since other jobs share the machine.
        run.sleep(rng.uniform(0, 1.5 * undisturbed.stages_s.get(target, 0.1)))

    def assert_not_redone(self, before: dict) -> dict[str, tuple[str, int]]:
        """Fails if finished files were rewritten; returns the files now finished."""
        redone = comparison.find_redone_files(self.workdir, before)
        assert not redone, f"redone: {', '.join(redone)}"
        return comparison.read_finished_files(self.workdir)

    def assert_resumes(self, undisturbed: Undisturbed, *flags: str, hosts=1) -> None:
        """Reruns the same command; its results must equal the undisturbed ones."""
        run = self.start(*flags, hosts=hosts)
        assert run.wait() == 0, f"exit code {run.exit_code()}: {run.errors()}"
        if hosts == 1:
            assert run.errors() == "", run.errors()
        self.assert_same(undisturbed)

    def assert_same(self, undisturbed: Undisturbed) -> None:
        results, expected = comparison.load_results(self.workdir), undisturbed.results
        names = sorted({*results, *expected})
        different = [name for name in names if results.get(name) != expected.get(name)]
        assert not different, f"results differ: {', '.join(different)}"


def assert_one_line(run: Run, code: int, *words: str) -> None:
    """Fails unless the run ended with `code` and a one-line error with all `words`."""
    errors = run.errors()
    assert run.exit_code() == code, f"exit code {run.exit_code()}: {errors}"
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1, f"{len(lines)} lines: {errors}"
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
