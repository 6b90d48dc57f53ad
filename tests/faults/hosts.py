"""Runs of two processes of which one is killed, suspended or preempted."""

import contextlib
import os
import pathlib
import signal
import socket
import time

from ccu_jax.distributed import preemption
from tests.faults.kills import (
    assert_not_redone,
    has_planned,
    is_in_last_stage,
    wait_for_moment,
    wait_until,
)
from tests.faults.runs import Run, Start, count_starts, current_stage
from tests.faults.world import SHORT, Case

_TWO_HOSTS = Start(hosts=2)
_WHO = {(0,): "process 0", (1,): "process 1", (0, 1): "both"}
# A signal takes effect at the next sync point: after compiling, on a busy machine.
_PREEMPTED_S = 100.0
# JAX's heartbeat timeout, and what a busy machine needs.
_LOST_S = 90.0
_ABORTED = -signal.SIGABRT  # by JAX, if a collective does not fail first


def killed(case: Case) -> None:
    """SIGKILL of one process or of both; `launch/local.sh` ends the rest."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    before: dict[str, tuple[str, int]] = {}
    for _ in range(case.num_faults(3, 5)):
        run = case.start(*SHORT, how=_TWO_HOSTS)
        wait_for_moment(case, run, undisturbed)
        victims, pids = case.rng.choice(list(_WHO)), run.peers()
        if run.code() is not None or len(pids) < 2:
            run.wait()
            break
        for victim in victims:
            _send(pids[victim], signal.SIGKILL)
        if run.wait(100) == 0:  # the run had ended before
            break
        case.faults.append(f"{_WHO[victims]}: {current_stage(case.workdir)}")
        _assert_ended(run, pids)
        assert "Traceback" not in run.errors(), run.errors()[-1500:]
        before = assert_not_redone(case, before)
    case.assert_resumes(undisturbed, *SHORT, how=_TWO_HOSTS)
    assert_not_redone(case, before)


def preempted(case: Case) -> None:
    """SIGTERM to one process or to both: all end with exit code 75."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    run = case.start(*SHORT, how=_TWO_HOSTS)
    wait_until(run, lambda: has_planned(case, run))
    wait_for_moment(case, run, undisturbed)
    pids = run.peers()
    if run.code() is None and len(pids) == 2:
        victims, at = case.rng.choice(list(_WHO)), current_stage(case.workdir)
        is_last = is_in_last_stage(case.workdir)
        for victim in victims:
            _send(pids[victim], signal.SIGTERM)
        began = time.monotonic()
        if run.wait(_PREEMPTED_S) == 0:
            assert is_last, f"not preempted in {at}"
        else:
            took_s = time.monotonic() - began
            case.faults.append(f"{_WHO[victims]}: {at}, {took_s:.0f} s")
            _assert_ended(run, pids)
            printed = run.errors()
            assert run.code() == 75, f"exit code {run.code()}: {printed[-1500:]}"
            assert "Traceback" not in printed, printed[-1500:]
            assert printed.count(preemption.MESSAGE) == 1, printed[-1500:]
    case.assert_resumes(undisturbed, *SHORT, how=_TWO_HOSTS)


def lost(case: Case) -> None:
    """One process is killed or suspended, and nothing ends the other one."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    pair = _start_pair(case)
    wait_until(pair[0], lambda: count_starts(case.workdir))
    wait_for_moment(case, pair[0], undisturbed)
    victim = case.rng.randrange(2)
    other = pair[1 - victim]
    is_suspended = case.number % 3 == 2
    if any(one.code() is not None for one in pair):
        for one in pair:
            assert one.wait() == 0, one.errors()[-1500:]
        return
    at = time.monotonic()
    pair[victim].signal(signal.SIGSTOP if is_suspended else signal.SIGKILL)
    try:
        code = other.wait(_LOST_S)
    finally:
        pair[victim].destroy()
    if code == 0:  # it had ended before
        return
    took_s = time.monotonic() - at
    how = "suspended" if is_suspended else "killed"
    case.faults.append(
        f"process {victim} {how}: {current_stage(case.workdir)}, {took_s:.0f} s"
    )
    printed = other.errors()
    assert code in (75, _ABORTED), f"exit code {code}: {printed[-1500:]}"
    assert "Traceback" not in printed, printed[-1500:]
    case.assert_resumes(undisturbed, *SHORT, how=_TWO_HOSTS)


def _start_pair(case: Case) -> list[Run]:
    """Starts two processes without `launch/local.sh`, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        case.start(
            *SHORT,
            *("--devices", "1", "--multihost", address, "2", str(index)),
            how=Start(),
        )
        for index in range(2)
    ]


def _send(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _assert_ended(run, pids):
    running = [pid for pid in pids if _is_running(pid)]
    assert not running, f"still running: {running}: {run.tail()}"


def _is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
