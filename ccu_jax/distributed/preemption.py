"""Preemption: SIGTERM ends a run with exit code 75, after steps of training are saved.

All files are written atomically, so a process may end at any time. Only the steps since
the last checkpoint would be lost; within `checkpointing` the run therefore saves them
before it ends.

A single process ends at once elsewhere. Several processes end together: JAX's
preemption service tells all of them of the signal that any of them got, and they agree
on the next common sync point (`multihost_utils.reached_preemption_sync_point`). Sync
points are the boundaries of training calls and all collectives that the host starts.
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
    """Of this process; the last two are set where there are several processes."""

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
    """Lets several processes stop at the same sync point, numbered from 1.

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
    """Ends the run here if it was told to stop; every collective calls this."""
    if should_stop() and not _State.is_checkpointing:
        exit_now()


@contextlib.contextmanager
def checkpointing() -> Iterator[None]:
    """Within the block the process does not end by itself but asks `should_stop`."""
    _State.is_checkpointing = True
    try:
        yield
    finally:
        _State.is_checkpointing = False
    if _State.is_requested:
        exit_now()


def disconnect() -> None:
    """Waits for the other processes, which end as well; does nothing if there are none.

    Process 0 must not exit before the others: without it JAX aborts them.
    """
    if _State.disconnect is not None:
        _State.disconnect()


def exit_now() -> NoReturn:
    """Ends the process, from whichever thread.

    Not by an exception: see `launch._exit_on_interrupt`.
    """
    _exiting.acquire()  # by one thread, once
    os.write(2, f"{MESSAGE}\n".encode())
    with contextlib.suppress(Exception):
        disconnect()
    os._exit(RETRY_EXIT_CODE)
