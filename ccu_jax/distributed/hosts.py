"""Startup, shutdown and collectives of the processes of a run, one per host.

All processes must call the collectives in the same order. Each collective is a sync
point, at which a preempted run exits.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ccu_jax.distributed import lost_hosts, preemption
from ccu_jax.errors import (
    RETRY_EXIT_CODE,
    RetryableError,
    UserError,
    exit_code,
    user_error_for,
)

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")

_VISIBLE_TIMEOUT_S = 60.0  # for files that another host wrote to the shared folder
_SHARED_TIMEOUT_S = 15.0  # for the file that tests whether a folder is shared
_SYNC_EVERY_S = 5.0
_DONE, _WORKING = 0, 1  # status of `run_on_primary`; all others are exit codes


def process_index_and_count() -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    return jax.process_index(), jax.process_count()


def is_primary() -> bool:
    """Returns whether this process is process 0, which writes logs and reports."""
    return jax.process_index() == 0


def join_hosts(addresses: dict[str, Any]) -> None:
    """Connects this process to the other processes of the run.

    `addresses` are keyword arguments of `jax.distributed.initialize`; JAX detects
    those that are missing. Raises UserError if it cannot, and
    RetryableError if the other processes cannot be reached.
    """
    start_s = time.monotonic()
    try:
        jax.distributed.initialize(
            **addresses,
            initialization_timeout=lost_hosts.START_TIMEOUT_S,
            heartbeat_timeout_seconds=lost_hosts.HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        waited_s = time.monotonic() - start_s
        raise lost_hosts.failed_start_error(error, addresses, waited_s) from error


@contextlib.contextmanager
def synchronize_preemption() -> Iterator[None]:
    """Makes a SIGTERM to one process stop all processes; ends with a barrier."""
    if not jax.distributed.is_initialized():
        yield
        return
    preemption.enable_sync_points(
        multihost_utils.reached_preemption_sync_point, jax.distributed.shutdown
    )
    yield
    # Not a sync point: a run that has finished is no longer preempted.
    multihost_utils.sync_global_devices("finish")


def barrier(name: str) -> None:
    """Blocks until all processes have reached the barrier `name`."""
    preemption.sync_point()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(condition: bool) -> bool:
    """Returns whether the condition holds on every process."""
    preemption.sync_point()
    if jax.process_count() == 1:
        return bool(condition)
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def broadcast_from_primary(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array; all processes pass the same shape and 32-bit dtype."""
    preemption.sync_point()
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def run_on_primary(
    work: Callable[[Progress], Result], progress: Progress
) -> Result | None:
    """Runs `work` on process 0 and returns its result; other processes return None.

    `work` receives a function that reports progress and is a sync point every few
    seconds, so that a SIGTERM ends the run. If `work` fails, all processes fail.
    """
    if jax.process_count() == 1:
        return work(progress)
    if not is_primary():
        while (status := _broadcast_status(_DONE)) == _WORKING:
            pass
        if status == _DONE:
            return None
        error = RetryableError if status == RETRY_EXIT_CODE else UserError
        raise error("process 0 failed; see its error message")
    synced_s = time.monotonic()

    def synced_progress(doing, done, total):
        nonlocal synced_s
        progress(doing, done, total)
        if time.monotonic() - synced_s > _SYNC_EVERY_S:
            _broadcast_status(_WORKING)
            synced_s = time.monotonic()

    try:
        result = work(synced_progress)
    except Exception as error:
        _broadcast_status(exit_code(user_error_for(error) or error))
        raise
    _broadcast_status(_DONE)
    return result


def _broadcast_status(status: int) -> int:
    """Broadcasts process 0's status to all processes and returns it."""
    return int(broadcast_from_primary(np.array(status, np.int32)))


def probe_shared_folder(folder: pathlib.Path) -> bool:
    """Writes a temporary file to `folder`; returns whether all processes see it."""
    if jax.process_count() == 1:
        return True
    token = broadcast_from_primary(np.array(time.time_ns() % 2**31))
    path = folder / f".shared-{token}"
    if is_primary():
        path.touch()
    barrier("shared folder")
    is_shared = all_agree(_wait_until(path.exists, _SHARED_TIMEOUT_S))
    if is_primary():
        path.unlink()
    return is_shared


def wait_until_visible(
    path: pathlib.Path, is_ready: Callable[[], bool] | None = None
) -> bool:
    """Waits until all processes see a path; returns False if process 0 does not see it.

    A network file system may show a file later on one host than on another. `is_ready`
    is the condition to wait for; by default, the path must exist. Raises RetryableError
    if this process does not see the path before the timeout.
    """
    is_ready = is_ready or path.exists
    if not _broadcast_status(is_ready()):
        return False
    if not _wait_until(is_ready, _VISIBLE_TIMEOUT_S):
        raise RetryableError(
            f"{path}: visible to process 0, but not to process {jax.process_index()} "
            f"after {_VISIBLE_TIMEOUT_S:.0f} s; put --workdir on a file system that "
            "all processes share and start all processes again"
        )
    return True


def _wait_until(is_ready: Callable[[], bool], timeout_s: float) -> bool:
    """Polls `is_ready` until it is true or the timeout; returns its last value."""
    end_s = time.monotonic() + timeout_s
    while not (ready := is_ready()) and time.monotonic() <= end_s:
        time.sleep(0.2)
    return ready
