"""The processes of a run, one per host: how they start and end, what they agree on.

Functions that return the same on every process are collectives: all processes call them
in the same order. Each is a sync point, at which a preempted run ends.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ccu_jax.distributed import preemption
from ccu_jax.errors import (
    RETRY_EXIT_CODE,
    RetryableError,
    UserError,
    exit_code,
    user_error_for,
)

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")

_HEARTBEAT_TIMEOUT_S = 60
_START_TIMEOUT_S = 300
_VISIBLE_TIMEOUT_S = 60.0  # for what another host wrote to the shared folder
_SHARED_TIMEOUT_S = 15.0  # the same, to find out whether the folder is shared
_EXIT_DELAY_S = 3.0
_SYNC_EVERY_S = 5.0
_DONE, _WORKING = 0, 1  # status of process 0 in `run_on_primary`; else an exit code
# Words of a collective that failed because another process is gone.
_PEER_ERRORS = ("Gloo", "NCCL", "by peer", "coordination service")


def process_index_and_count() -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    return jax.process_index(), jax.process_count()


def is_primary() -> bool:
    """Returns whether this is process 0, which writes logs and reports."""
    return jax.process_index() == 0


def join_hosts(addresses: dict[str, Any]) -> None:
    """Connects to the other processes of this run.

    `addresses` are arguments of `jax.distributed.initialize`, or empty: JAX finds them.

    Raises:
        UserError: they are neither given nor detected.
        RetryableError: the other processes cannot be reached.
    """
    began = time.monotonic()
    try:
        jax.distributed.initialize(
            **addresses,
            initialization_timeout=_START_TIMEOUT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        reason = f"cannot join the other hosts: {str(error).partition(chr(10))[0]}"
        waited_s = time.monotonic() - began
        if waited_s >= _START_TIMEOUT_S:  # JAX's own message does not say this
            count = addresses.get("num_processes", "other")
            reason = f"not all {count} processes have started within {waited_s:.0f} s"
        elif isinstance(error, ValueError):
            hint = "" if addresses else "; pass --multihost ADDRESS:PORT COUNT INDEX"
            raise UserError(reason + hint) from error
        # An address that does not resolve yet, or a port that is still in use.
        raise RetryableError(f"{reason}; start all processes again") from error


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Within the block, a SIGTERM to one process ends all of them; waits for all."""
    if not jax.distributed.is_initialized():
        yield
        return
    preemption.use_sync_points(
        multihost_utils.reached_preemption_sync_point, jax.distributed.shutdown
    )
    yield
    # Not a sync point: a run that has finished is no longer preempted.
    multihost_utils.sync_global_devices("finish")


def let_others_exit() -> None:
    """Delays the exit of process 0 after an error that other processes may share.

    It runs JAX's coordinator: as soon as it exits, JAX aborts all others.
    """
    if jax.distributed.is_initialized() and is_primary() and jax.process_count() > 1:
        time.sleep(_EXIT_DELAY_S)


def barrier(name: str) -> None:
    """Waits until every process is here."""
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
    """Returns process 0's value of an array of 32-bit numbers."""
    preemption.sync_point()
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def run_on_primary(
    work: Callable[[Progress], Result], progress: Progress
) -> Result | None:
    """Runs long work on process 0 while the others wait; they return None.

    `work` is passed a function to report progress, which is a sync point every few
    seconds: a SIGTERM ends the run during the work. If it fails, all processes fail.
    """
    if jax.process_count() == 1:
        return work(progress)
    if not is_primary():
        while (
            status := int(broadcast_from_primary(np.array(_DONE, np.int32)))
        ) == _WORKING:
            pass
        if status != _DONE:
            error = RetryableError if status == RETRY_EXIT_CODE else UserError
            raise error("process 0 has failed; see the error that it printed")
        return None
    synced_s = time.monotonic()

    def synced_progress(doing, done, total):
        nonlocal synced_s
        progress(doing, done, total)
        if time.monotonic() - synced_s > _SYNC_EVERY_S:
            broadcast_from_primary(np.array(_WORKING, np.int32))
            synced_s = time.monotonic()

    try:
        result = work(synced_progress)
    except Exception as error:
        code = exit_code(user_error_for(error) or error)
        broadcast_from_primary(np.array(code, np.int32))
        raise
    broadcast_from_primary(np.array(_DONE, np.int32))
    return result


def is_shared_folder(folder: pathlib.Path) -> bool:
    """Returns whether all processes see the same folder."""
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
    """Returns whether process 0 sees a path; the others wait until they see it, too.

    A network file system may show a file later on one host than on another. `is_ready`
    is what to wait for, by default that the path exists.

    Raises:
        RetryableError: this process does not see it in time.
    """
    is_ready = is_ready or path.exists
    if not broadcast_from_primary(np.array(is_ready(), np.int32)):
        return False
    if not _wait_until(is_ready, _VISIBLE_TIMEOUT_S):
        raise RetryableError(
            f"{path}: seen by process 0, not by process {jax.process_index()} within "
            f"{_VISIBLE_TIMEOUT_S:.0f} s; put --workdir on a file system that all "
            "processes share and start them again"
        )
    return True


def _wait_until(is_ready: Callable[[], bool], timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while not is_ready():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.2)
    return True


def lost_peer_error(error: BaseException | None) -> RetryableError | None:
    """Returns the error to show if a collective failed because a process is gone."""
    while error is not None and jax.distributed.is_initialized():
        if any(words in str(error) for words in _PEER_ERRORS):
            return RetryableError(
                "another process of this run has failed or cannot be reached; start "
                "all processes again to resume"
            )
        error = error.__cause__ or error.__context__
    return None
