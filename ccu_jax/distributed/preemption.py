"""Preemption: SIGTERM ends a run with exit code 75, after steps of training are saved.

All files are written atomically, so a process may end at any time. Only the steps since
the last checkpoint would be lost; within `checkpointing` the run therefore saves them
before it ends.

Elsewhere a single process ends at once. Several processes end together: JAX's
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
    """State of this process; the last two are set if there are several processes."""

    is_requested = False  # all processes stop at this sync point or the next one
    is_checkpointing = False
    num_sync_points = 0
    reached_sync_point: Callable[[int], bool] | None = None
    disconnect: Callable[[], None] | None = None


_exiting = threading.Lock()


def install() -> None:
    """Handles SIGTERM in this process, unless its parent ignores or handles it."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    # A Python handler runs in the main thread, which may be compiling or waiting for
    # another process in C++. A thread that reads the wakeup pipe reacts at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()


def _listen(pipe: int) -> None:
    while number := os.read(pipe, 1):
        if number[0] == signal.SIGTERM:
            _State.is_requested = True
            if not _State.is_checkpointing:
                exit_now()


def use_sync_points(
    reached_sync_point: Callable[[int], bool], disconnect: Callable[[], None]
) -> None:
    """Makes several processes stop at the same sync point; the first has number 1.

    `disconnect` waits until all processes call it, before they exit.
    """
    _State.reached_sync_point, _State.disconnect = reached_sync_point, disconnect


def should_stop() -> bool:
    """Returns whether to save a checkpoint and stop.

    Of several processes, all must call this at the same steps, and get the same answer.
    """
    if _State.reached_sync_point is not None and not _State.is_requested:
        _State.num_sync_points += 1
        _State.is_requested = _State.reached_sync_point(_State.num_sync_points)
    return _State.is_requested


def sync_point() -> None:
    """Ends the process here if all were asked to stop; every collective calls this."""
    if should_stop() and not _State.is_checkpointing:
        exit_now()


@contextlib.contextmanager
def checkpointing() -> Iterator[None]:
    """Within the block SIGTERM does not end the process; call `should_stop` there."""
    _State.is_checkpointing = True
    try:
        yield
    finally:
        _State.is_checkpointing = False
    if _State.is_requested:
        exit_now()


def disconnect() -> None:
    """Waits for the other processes, if there are any: all of them end.

    Process 0 must exit last, because JAX aborts the others without it.
    """
    if _State.disconnect is not None:
        _State.disconnect()


def exit_now() -> NoReturn:
    """Ends the process, from any thread.

    Not by an exception, for the reasons of `launch._exit_on_interrupt`.
    """
    _exiting.acquire()  # never released: only the first thread continues
    os.write(2, f"{MESSAGE}\n".encode())
    with contextlib.suppress(Exception):
        disconnect()
    os._exit(RETRY_EXIT_CODE)
