"""SIGTERM ends a run at a sync point, and within `defer_exit` after a checkpoint."""

import subprocess
import sys
from unittest import mock

import pytest

from ccu_jax import errors
from ccu_jax.distributed import preemption

SCRIPT = """
import os, signal, time
from ccu_jax.distributed import preemption
preemption.install_handler()
def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)

"""
CHECKPOINTING = """
with preemption.defer_exit():
    assert not preemption.should_stop()
    terminate()
    terminate()
    assert preemption.should_stop()
    print("saved", flush=True)
print("not reached", flush=True)
"""
ELSEWHERE = """
with preemption.defer_exit():
    assert not preemption.should_stop()
print("elsewhere", flush=True)
terminate()
print("not reached", flush=True)
"""
# In C, like a wait for another process: handlers in Python are not called.
BLOCKED = """
import ctypes, threading
threading.Timer(0.2, terminate).start()
print("blocked", flush=True)
lock = ctypes.pointer((ctypes.c_long * 16)())
ctypes.CDLL(None).pthread_mutex_lock(lock)
ctypes.CDLL(None).pthread_mutex_lock(lock)
print("not reached", flush=True)
"""


@pytest.mark.parametrize(
    "code, printed",
    [(CHECKPOINTING, "saved"), (ELSEWHERE, "elsewhere"), (BLOCKED, "blocked")],
)
def test_signal_ends_the_process_at_once_or_after_the_checkpoint(code, printed):
    command = [sys.executable, "-c", SCRIPT + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (errors.RETRY_EXIT_CODE, f"{printed}\n")
    assert done.stderr.strip() == preemption.MESSAGE


class Exited(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Lets processes agree to stop at the sync point with the given number."""
    monkeypatch.setattr(preemption, "exit_now", mock.Mock(side_effect=Exited))
    for name, value in vars(preemption._State).items():
        if not name.startswith("__"):
            monkeypatch.setattr(preemption._State, name, value)
    return lambda number: preemption.enable_sync_points(number.__eq__, lambda: None)


def test_processes_exit_at_the_agreed_sync_point(stop_at):
    stop_at(3)
    preemption.sync_point()
    assert not preemption.should_stop()
    with pytest.raises(Exited):
        preemption.sync_point()


def test_sync_point_within_checkpointing_is_left_to_the_next_checkpoint(stop_at):
    stop_at(2)
    block = preemption.defer_exit()
    block.__enter__()
    preemption.sync_point()
    preemption.sync_point()  # as of a collective between two steps
    assert preemption.should_stop()
    assert preemption.should_stop()
    with pytest.raises(Exited):
        block.__exit__(None, None, None)
    assert preemption._State.num_sync_points == 2
