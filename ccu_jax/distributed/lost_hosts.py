"""Lost hosts: timeouts, and the errors shown if another process cannot be reached.

Most errors are a `RetryableError`, so the process exits with code 75.
`launch/retry_policy.sh` decides after which exit codes all processes are started again.
"""

import time
from typing import Any

import jax

from ccu_jax.errors import RetryableError, UserError

START_TIMEOUT_S = 300
# If a process is silent for this long, JAX aborts all others (exit code 134).
HEARTBEAT_TIMEOUT_S = 60
_EXIT_DELAY_S = 3.0
# Substrings of the messages of collectives that fail because a process is lost.
_ERROR_PARTS = ("Gloo", "NCCL", "by peer", "coordination service")


def failed_start_error(
    error: Exception, addresses: dict[str, Any], waited_s: float
) -> UserError:
    """Converts an exception of `jax.distributed.initialize` to the error to show."""
    reason = f"cannot join the other hosts: {str(error).partition(chr(10))[0]}"
    if waited_s >= START_TIMEOUT_S:  # JAX's own message does not say this
        count = addresses.get("num_processes", "other")
        reason = f"not all {count} processes have started within {waited_s:.0f} s"
    elif isinstance(error, ValueError):
        hint = "" if addresses else "; pass --multihost ADDRESS:PORT COUNT INDEX"
        return UserError(reason + hint)
    # Such as an address that does not resolve yet, or a port that is still in use.
    return RetryableError(f"{reason}; start all processes again")


def lost_host_error(error: BaseException | None) -> RetryableError | None:
    """Returns the error to show if a process is lost; None for other exceptions."""
    while error is not None and jax.distributed.is_initialized():
        if "RESOURCE_EXHAUSTED" in str(error):  # may name NCCL as well
            return None
        if any(part in str(error) for part in _ERROR_PARTS):
            return RetryableError(
                "another process of this run failed or cannot be reached; start "
                "all processes again to resume"
            )
        error = error.__cause__ or error.__context__
    return None


def delay_coordinator_exit() -> None:
    """Delays the exit of process 0 after an error, so that others can report theirs."""
    # Process 0 runs JAX's coordinator: when it exits, JAX aborts all other processes.
    has_others = jax.distributed.is_initialized() and jax.process_count() > 1
    if has_others and jax.process_index() == 0:
        time.sleep(_EXIT_DELAY_S)
