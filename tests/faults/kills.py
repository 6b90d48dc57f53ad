"""Runs that are killed or told to leave, and go on."""

import signal
import time

from ccu_jax.distributed import preemption
from tests.faults import same as faults_same
from tests.faults.runs import Run, Start, events, starts, where
from tests.faults.world import Case, Undisturbed, one_line

_MOST = (5, 10)  # kills of a run, before it may end
_REAL = 0.1  # share of starts that are not forked


def killed(case: Case) -> None:
    """SIGKILL, again and again, at any moment of any stage."""
    more = case.world.streamed if case.number % 4 == 3 else case.world.whole
    undisturbed = case.world.undisturbed(*more)
    before: dict[str, tuple[str, int]] = {}
    for _ in range(case.many(*_MOST)):
        run = case.start(*more, how=Start(real=case.draw.random() < _REAL))
        moment(case, run, undisturbed)
        if run.code() is not None:
            break
        run.signal(signal.SIGKILL)
        if run.wait(20) == 0:  # just before
            break
        assert run.code() == -signal.SIGKILL, run.errors()[-1500:]
        case.faults.append(where(case.workdir))
        before = kept(case, before)
    assert run.code() in (0, -signal.SIGKILL), run.errors()[-1500:]
    case.ends_like(undisturbed, *more)
    kept(case, before)


def preempted(case: Case) -> None:
    """SIGTERM, at any moment."""
    more = case.world.streamed if case.number % 4 == 3 else case.world.whole
    undisturbed = case.world.undisturbed(*more)
    before: dict[str, tuple[str, int]] = {}
    for _ in range(case.many(3, 3)):
        run = case.start(*more, how=Start(real=case.draw.random() < _REAL))
        # Before it listens, it ends as any program does.
        until(run, lambda run=run: starts(case.workdir) > run.before)
        moment(case, run, undisturbed)
        if run.code() is not None:
            break
        at, last = where(case.workdir), in_last_stage(case.workdir)
        run.signal(signal.SIGTERM)
        case.faults.append(at)
        run.wait(60)
        if run.code() == 0:
            assert last, f"not heeded in {at}"
            break
        one_line(run, 75, preemption.MESSAGE)
        before = kept(case, before)
    case.ends_like(undisturbed, *more)
    kept(case, before)


def in_last_stage(workdir) -> bool:
    """Whether the run has begun the last of its stages: it may end as if not told."""
    last, begun = None, False
    for event in events(workdir):
        if event["kind"] == "plan":
            last, begun = event["stages"][-1], False
        begun |= event["kind"] == "stage_start" and event["title"] == last
    return begun


def moment(case: Case, run: Run, undisturbed: Undisturbed, workdir=None) -> None:
    """Waits for a moment: any of the run, or any of a stage that is yet to come.

    `workdir`: where it is seen from here, if not as the run sees it.
    """
    draw, workdir = case.draw, workdir or case.workdir
    if draw.random() < 0.3:
        # Less than the whole: what is done is not done again.
        return _sleep(run, draw.uniform(0, 0.6 * undisturbed.seconds))
    aims = [name for name in undisturbed.stages if name not in _ended(workdir)]
    if starts(workdir):
        aims.remove("data")  # over in a moment, once it is prepared
    # Mostly one of the next, so that many kills come to one run.
    aim = aims[min(int(draw.expovariate(1)), len(aims) - 1)]
    if draw.random() < 0.2:
        aim = draw.choice(["feature store", "evaluation"])

    def there():
        if starts(workdir) == run.before:
            return False
        at = where(workdir)
        return at.partition(":")[0] == aim or at.endswith(aim)

    until(run, there)
    # Half as long again, as it takes longer where others are at work.
    _sleep(run, draw.uniform(0, 1.5 * undisturbed.stages.get(aim, 0.1)))


def kept(case: Case, before: dict) -> dict[str, tuple[str, int]]:
    """Fails where finished work was done again; gives what is finished now."""
    again = faults_same.redone(case.workdir, before)
    assert not again, f"done again: {', '.join(again)}"
    return faults_same.finished(case.workdir)


def _ended(workdir):
    return {
        event["title"].removeprefix("seed 0: ")
        for event in events(workdir)
        if event["kind"] == "stage_end" and event["title"] not in ("data", "report")
    }


def _sleep(run, seconds):
    end = time.monotonic() + seconds
    while run.code() is None and time.monotonic() < end:
        time.sleep(min(0.01, max(0.0, end - time.monotonic())))


def until(run, true):
    while run.code() is None and not true():
        time.sleep(0.005)
