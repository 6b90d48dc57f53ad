"""Kills, preempts and suspends runs, and resumes them on other devices."""

import pathlib
import signal
import time
from functools import partial

from ccu_jax.distributed import preemption
from tests.end_to_end.conftest import assert_close_logits
from tests.end_to_end.launching import find_free_address
from tests.faults import runs
from tests.faults.runs import Run, find_stage, send_signal
from tests.faults.world import HOST_FLAGS, METHOD_FLAGS, Case, assert_one_line

_VICTIMS = {(0,): "process 0", (1,): "process 1", (0, 1): "both"}
# A signal takes effect at the next sync point: after compiling, on a busy machine.
_MAX_EXIT_S = 100.0
# JAX's heartbeat timeout, and what a busy machine needs.
_MAX_LOST_S = 90.0
_ABORTED = -signal.SIGABRT  # by JAX, if a collective does not fail first
_METADATA = "[0-9]*/meta/metadata"
_CHECKPOINTS = {
    "in training": f"checkpoints/original-0/steps*/{_METADATA}",
    "in a method": f"checkpoints/ccu_plus-0/steps*/{_METADATA}",
    "before the evaluation": f"checkpoints/ccu_plus-0/params/{_METADATA}",
}
_NUM_DEVICES = (1, 2, 8)


def _send_signals(case: Case, number: int, limits: tuple[int, int], hosts=1) -> None:
    """Signals starts at random moments; they must resume without redoing work."""
    flags = case.world.stream_flags if case.number % 4 == 3 else case.world.purge_flags
    flags = flags if hosts == 1 else HOST_FLAGS
    undisturbed = case.world.run_undisturbed(*flags, hosts=hosts)
    finished: dict[str, tuple[str, int]] = {}
    for _ in range(1 if case.world.is_quick else case.rng.randint(*limits)):
        run = case.start(*flags, hosts=hosts)
        if number == signal.SIGTERM:  # kills the run until its handler is installed
            run.wait_until(lambda run=run: case.has_planned(run))
        case.wait_for_moment(run, undisturbed)
        pids = [run.pid] if hosts == 1 else run.host_pids()
        if run.exit_code() is not None or len(pids) < hosts:
            assert run.wait() == 0, run.errors()
            break
        victims = (0,) if hosts == 1 else case.rng.choice(list(_VICTIMS))
        stage, is_last = find_stage(case.workdir), runs.is_in_last_stage(case.workdir)
        for victim in victims:
            send_signal(pids[victim], number)
        if run.wait(_MAX_EXIT_S) == 0:  # the run had just ended
            assert number == signal.SIGKILL or is_last, f"not preempted in {stage}"
            break
        case.faults.append(stage if hosts == 1 else f"{_VICTIMS[victims]}: {stage}")
        _assert_ended_by(number, run, pids)
        finished = case.assert_not_redone(finished)
    case.assert_resumes(undisturbed, *flags, hosts=hosts)
    case.assert_not_redone(finished)


kill_run = partial(_send_signals, number=signal.SIGKILL, limits=(5, 10))
preempt_run = partial(_send_signals, number=signal.SIGTERM, limits=(3, 3))
# `launch/local.sh` ends the other process, with exit code 75 after SIGTERM.
kill_hosts = partial(_send_signals, number=signal.SIGKILL, limits=(3, 5), hosts=2)
preempt_hosts = partial(_send_signals, number=signal.SIGTERM, limits=(1, 1), hosts=2)


def _assert_ended_by(number: int, run: Run, pids: list[int]) -> None:
    """Fails unless all processes ended as expected after the signal `number`."""
    running = [pid for pid in pids if _is_running(pid)]
    assert not running, f"still running: {running}: {run.errors()}"
    assert "Traceback" not in run.errors(), run.errors()
    if number == signal.SIGTERM and len(pids) == 1:
        assert_one_line(run, 75, preemption.MESSAGE)
    elif number == signal.SIGTERM:  # the last lines of the other process follow
        assert run.exit_code() == 75, f"exit code {run.exit_code()}: {run.errors()}"
        assert run.errors().count(preemption.MESSAGE) == 1, run.errors()
    elif len(pids) == 1:
        assert run.exit_code() == -signal.SIGKILL, run.errors()


def _is_running(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def lose_peer(case: Case) -> None:
    """Kills or suspends one of two processes; JAX must end the other one."""
    undisturbed = case.world.run_undisturbed(*HOST_FLAGS, hosts=2)
    # Without `launch/local.sh`, as on two machines.
    flags = (*HOST_FLAGS, "--devices", "1", "--multihost", find_free_address(), "2")
    pair = [case.start(*flags, str(index)) for index in range(2)]
    pair[0].wait_until(lambda: runs.count_starts(case.workdir))
    case.wait_for_moment(pair[0], undisturbed)
    victim = case.rng.randrange(2)
    survivor, is_suspended = pair[1 - victim], case.number % 3 == 2
    if any(run.exit_code() is not None for run in pair):
        for run in pair:
            assert run.wait() == 0, run.errors()
        return
    lost_s = time.monotonic()
    send_signal(pair[victim].pid, signal.SIGSTOP if is_suspended else signal.SIGKILL)
    try:
        code = survivor.wait(_MAX_LOST_S)
    finally:
        pair[victim].kill()
    if code == 0:  # it had ended before
        return
    fault = f"process {victim} {'suspended' if is_suspended else 'killed'}"
    seconds = time.monotonic() - lost_s
    case.faults.append(f"{fault}: {find_stage(case.workdir)}, {seconds:.0f} s")
    assert code in (75, _ABORTED), f"exit code {code}: {survivor.errors()}"
    assert "Traceback" not in survivor.errors(), survivor.errors()
    case.assert_resumes(undisturbed, *HOST_FLAGS, hosts=2)


def change_devices(case: Case) -> None:
    """Kills a run on four devices and resumes it on one, two or eight."""
    place = list(_CHECKPOINTS)[case.number // len(_NUM_DEVICES) % len(_CHECKPOINTS)]
    num_devices = _NUM_DEVICES[case.number % len(_NUM_DEVICES)]
    flags = (*METHOD_FLAGS, "--devices", "4")
    undisturbed = case.world.run_undisturbed(*flags)
    killed = case.world.kill_at_file(flags, _CHECKPOINTS[place], name=place)
    case.copy_from(killed)
    run = case.start(*METHOD_FLAGS, "--devices", str(num_devices))
    assert run.wait() == 0, run.errors()
    case.faults.append(f"{place}, then {num_devices} devices")
    assert "unusable" not in run.output(), run.output()
    # Logits, since rounding changes parameters that hardly affect them.
    methods = ("original", "ccu_plus")
    assert_close_logits(undisturbed.workdir, case.workdir, methods)
