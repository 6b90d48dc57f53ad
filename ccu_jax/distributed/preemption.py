"""Preemption: SIGTERM ends a run with exit code 75, after saving a checkpoint.

All files are written atomically, so a process may exit at any time. Only the training
steps since the last checkpoint would be lost; within `defer_exit` the run therefore
saves a checkpoint before it exits.

Elsewhere a single process exits at once. Several processes exit together: JAX's
preemption service informs all of them of a signal to one, and they agree on the next
common sync point (`multihost_utils.reached_preemption_sync_point`). Sync points are the
boundaries of training calls and all collectives that the host starts.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ccu_jax.errors import RETRY_EXIT_CODE

MESSAGE = "stopped by SIGTERM; rerun the same command to resume"


class _State:
    """The preemption state of this process."""

    is_requested = False  # whether the process exits at the next sync point
    is_exit_deferred = False
    num_sync_points = 0
    # See `enable_sync_points`; None in a run of a single process.
    reached_sync_point: Callable[[int], bool] | None = None
    disconnect: Callable[[], None] | None = None


_exiting = threading.Lock()


def install_handler() -> None:
    """Installs the SIGTERM handler, unless SIGTERM is ignored or handled already."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    # A Python handler runs in the main thread, which may be blocked in C++ by a
    # compilation or a collective. A thread that reads the wakeup pipe reacts at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def _listen(pipe: int) -> None:
    """Requests a stop for each SIGTERM in the wakeup pipe; exits unless deferred."""
    while number := os.read(pipe, 1):
        if number[0] == signal.SIGTERM:
            _State.is_requested = True
            if not _State.is_exit_deferred:
                exit_now()


def enable_sync_points(
    reached_sync_point: Callable[[int], bool], disconnect: Callable[[], None]
) -> None:
    """Makes all processes of a run stop at the same sync point.

    Args:
        reached_sync_point: `multihost_utils.reached_preemption_sync_point`, or another
            function of the number of a sync point that returns whether to stop there;
            each process numbers its sync points from 1.
        disconnect: called before the exit; blocks until all processes call it.
    """
    _State.reached_sync_point, _State.disconnect = reached_sync_point, disconnect


def should_stop() -> bool:
    """Counts a sync point and returns whether to save a checkpoint and stop.

    All processes must call this at the same steps, and all get the same answer.
    """
    if _State.reached_sync_point is not None and not _State.is_requested:
        _State.num_sync_points += 1
        _State.is_requested = _State.reached_sync_point(_State.num_sync_points)
    return _State.is_requested


def sync_point() -> None:
    """Exits if the run stops at this sync point; called by every collective."""
    if should_stop() and not _State.is_exit_deferred:
        exit_now()


@contextlib.contextmanager
def defer_exit() -> Iterator[None]:
    """Defers the exit on SIGTERM to the end of the block; poll `should_stop` in it."""
    _State.is_exit_deferred = True
    try:
        yield
    finally:
        _State.is_exit_deferred = False
    if _State.is_requested:
        exit_now()


def disconnect() -> None:
    """Waits until all processes are about to exit, then disconnects from them."""
    # Process 0 must not exit first, because JAX would abort the others.
    if _State.disconnect is not None:
        _State.disconnect()


def exit_now() -> NoReturn:
    """Exits with code 75 from any thread."""
    # No exception is raised, for the reasons given in `launch._exit_on_interrupt`.
    _exiting.acquire()  # never released: only the first thread continues
    os.write(2, f"{MESSAGE}\n".encode())
    with contextlib.suppress(Exception):
        disconnect()
    os._exit(RETRY_EXIT_CODE)
