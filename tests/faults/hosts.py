"""Runs of two processes of which one is killed, hangs, or is told to leave."""

import os
import pathlib
import signal
import socket
import time

from ccu_jax import errors
from ccu_jax.distributed import peers
from tests.faults.kills import in_last_stage, kept, moment, until
from tests.faults.runs import Run, Start, starts, where
from tests.faults.world import SHORT, Case

_TOGETHER = Start(hosts=2)
_WHO = {(0,): "process 0", (1,): "process 1", (0, 1): "both"}
# The other one has to notice, to tell, and to be noticed here.
_MORE_S = 15.0
_NOTICE_S = 30.0  # what a cloud gives a machine that it takes away


def killed(case: Case) -> None:
    """SIGKILL of one process, or of both; what started them ends all the rest."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    before: dict[str, tuple[str, int]] = {}
    for _ in range(case.many(3, 5)):
        run = case.start(*SHORT, how=_TOGETHER)
        moment(case, run, undisturbed)
        victims, pids = case.draw.choice(list(_WHO)), run.peers()
        if run.code() is not None or len(pids) < 2:
            run.wait()
            break
        for victim in victims:
            _send(pids[victim], signal.SIGKILL)
        if run.wait(100) == 0:  # just before
            break
        case.faults.append(f"{_WHO[victims]}: {where(case.workdir)}")
        _ended(run, pids)
        told = run.errors()
        assert "all were ended" in told, told[-1500:]
        assert any(f"process {n} failed" in told for n in range(2)), told[-1500:]
        assert "Traceback" not in told, told[-1500:]
        before = kept(case, before)
    case.ends_like(undisturbed, *SHORT, how=_TOGETHER)
    kept(case, before)


def told_to_leave(case: Case) -> None:
    """SIGTERM of one, or of both; all leave with what they go on from, and soon."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    run = case.start(*SHORT, how=_TOGETHER)
    until(run, lambda: starts(case.workdir) > run.before)
    moment(case, run, undisturbed)
    pids = run.peers()
    if run.code() is None and len(pids) == 2:
        victims, at = case.draw.choice(list(_WHO)), where(case.workdir)
        last = in_last_stage(case.workdir)
        for victim in victims:
            _send(pids[victim], signal.SIGTERM)
        began = time.monotonic()
        if run.wait(_NOTICE_S) == 0:
            assert last, f"not heeded in {at}"
        else:
            took_s = time.monotonic() - began
            case.faults.append(f"{_WHO[victims]}: {at}, {took_s:.0f} s")
            _ended(run, pids)
            told = run.errors()
            assert run.code() == 75, f"exit code {run.code()}: {told[-1500:]}"
            assert "Traceback" not in told, told[-1500:]
            assert told.count("told to leave (SIGTERM)") == 1, told[-1500:]
    case.ends_like(undisturbed, *SHORT, how=_TOGETHER)


def lost(case: Case) -> None:
    """One is killed, or hangs; the other ends by itself, and names it."""
    undisturbed = case.world.undisturbed(*SHORT, hosts=2)
    pair = _pair(case)
    until(pair[0], lambda: starts(case.workdir))
    moment(case, pair[0], undisturbed)
    victim = case.draw.randrange(2)
    other = pair[1 - victim]
    hangs = case.number % 3 == 2
    if any(one.code() is not None for one in pair):
        return _all_ended(pair)
    at = time.monotonic()
    pair[victim].signal(signal.SIGSTOP if hangs else signal.SIGKILL)
    allowed_s = (peers.TIMEOUT_S if hangs else 0) + _MORE_S
    try:
        code = other.wait(allowed_s)
    finally:
        pair[victim].destroy()
    if code == 0:  # it was at its end
        return
    took_s = time.monotonic() - at
    how = "hangs" if hangs else "is killed"
    case.faults.append(f"process {victim} {how}: {where(case.workdir)}, {took_s:.0f} s")
    told = other.errors()
    assert code == errors.PEER_LOST_EXIT_CODE, f"exit code {code}: {told[-1500:]}"
    assert "Traceback" not in told, told[-1500:]
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"process {victim} of this run" in lines[0], told[-1500:]
    case.ends_like(undisturbed, *SHORT, how=_TOGETHER)


def _pair(case: Case) -> list[Run]:
    """Two processes that nobody looks after, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        case.start(
            *SHORT,
            *("--devices", "1", "--multihost", address, "2", str(index)),
            how=Start(real=True),
        )
        for index in range(2)
    ]


def _all_ended(pair):
    for one in pair:
        assert one.wait() == 0, one.errors()[-1500:]


def _send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _ended(run, pids):
    """Fails where a process of the run is left."""
    left = [pid for pid in pids if _alive(pid)]
    assert not left, f"still there: {left}: {run.tail()}"


def _alive(pid):
    """Whether it is at work; one that nobody has asked about since its end is not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
