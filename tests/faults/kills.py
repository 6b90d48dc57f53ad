"""Runs that are killed or preempted, and resumed."""

import signal
import time

from ccu_jax.distributed import preemption
from tests.faults import same
from tests.faults.runs import Run, count_starts, current_stage, read_events
from tests.faults.world import Case, Undisturbed, assert_one_line


def killed(case: Case) -> None:
    """SIGKILL, several times, at any moment of any stage."""
    flags = case.world.streamed if case.number % 4 == 3 else case.world.purged
    undisturbed = case.world.undisturbed(*flags)
    finished: dict[str, tuple[str, int]] = {}
    for _ in range(case.num_faults(5, 10)):
        run = case.start(*flags)
        wait_for_moment(case, run, undisturbed)
        if run.code() is not None:
            assert run.code() == 0, run.errors()[-1500:]
            break
        run.signal(signal.SIGKILL)
        if run.wait(20) == 0:  # it had just ended
            break
        assert run.code() == -signal.SIGKILL, run.errors()[-1500:]
        case.faults.append(current_stage(case.workdir))
        finished = assert_not_redone(case, finished)
    case.assert_resumes(undisturbed, *flags)
    assert_not_redone(case, finished)


def preempted(case: Case) -> None:
    """SIGTERM, at any moment."""
    flags = case.world.streamed if case.number % 4 == 3 else case.world.purged
    undisturbed = case.world.undisturbed(*flags)
    finished: dict[str, tuple[str, int]] = {}
    for _ in range(case.num_faults(3, 3)):
        run = case.start(*flags)
        # Before it handles the signal, it ends like any program.
        wait_until(run, lambda run=run: has_planned(case, run))
        wait_for_moment(case, run, undisturbed)
        if run.code() is not None:
            break
        stage, is_last = current_stage(case.workdir), is_in_last_stage(case.workdir)
        run.signal(signal.SIGTERM)
        case.faults.append(stage)
        run.wait(60)
        if run.code() == 0:
            assert is_last, f"not preempted in {stage}"
            break
        assert_one_line(run, 75, preemption.MESSAGE)
        finished = assert_not_redone(case, finished)
    case.assert_resumes(undisturbed, *flags)
    assert_not_redone(case, finished)


def has_planned(case: Case, run: Run) -> bool:
    """Whether this start has logged its plan."""
    return count_starts(case.workdir) > run.num_starts_before


def is_in_last_stage(workdir) -> bool:
    """Whether the last stage has begun: the run may end before it is preempted."""
    last, has_begun = None, False
    for event in read_events(workdir):
        if event["kind"] == "plan":
            last, has_begun = event["stages"][-1], False
        has_begun |= event["kind"] == "stage_start" and event["title"] == last
    return has_begun


def wait_for_moment(case: Case, run: Run, undisturbed: Undisturbed, workdir=None):
    """Waits for a moment of the run, or of a stage that is not finished.

    `workdir`: its path as seen from here, if the run sees another one.
    """
    rng, workdir = case.rng, workdir or case.workdir
    if rng.random() < 0.3:
        return _sleep(run, rng.uniform(0, 0.6 * undisturbed.seconds))
    finished = {
        event["title"].removeprefix("seed 0: ")
        for event in read_events(workdir)
        if event["kind"] == "stage_end" and event["title"] not in ("data", "report")
    }
    stages = [name for name in undisturbed.stages if name not in finished]
    if count_starts(workdir):
        stages.remove("data")  # takes no time once it is prepared
    # Mostly one of the next stages, so that a run is hit often.
    aim = stages[min(int(rng.expovariate(1)), len(stages) - 1)]
    if rng.random() < 0.2:
        aim = rng.choice(["feature store", "evaluation"])

    def is_there():
        if count_starts(workdir) == run.num_starts_before:
            return False
        stage = current_stage(workdir)
        return stage.partition(":")[0] == aim or stage.endswith(aim)

    wait_until(run, is_there)
    # Longer than undisturbed, since other jobs share the machine.
    _sleep(run, rng.uniform(0, 1.5 * undisturbed.stages.get(aim, 0.1)))


def assert_not_redone(case: Case, before: dict) -> dict[str, tuple[str, int]]:
    """Fails if finished work was redone; returns what is finished now."""
    redone = same.redone_files(case.workdir, before)
    assert not redone, f"redone: {', '.join(redone)}"
    return same.finished_files(case.workdir)


def wait_until(run, condition):
    """Waits until the condition holds or the run has ended."""
    while run.code() is None and not condition():
        time.sleep(0.005)


def _sleep(run, seconds):
    end_s = time.monotonic() + seconds
    while run.code() is None and time.monotonic() < end_s:
        time.sleep(min(0.01, max(0.0, end_s - time.monotonic())))
