"""Lost hosts: how long a process waits for the others, and the error that ends it.

The error is a `RetryableError`, so the process exits with code 75.
`launch/retry_policy.sh` decides after which exit codes all processes are started again.
"""

import time
from typing import Any

import jax

from ccu_jax.errors import RetryableError, UserError

START_TIMEOUT_S = 300
# After it, JAX aborts the processes that are left (exit code 134).
HEARTBEAT_TIMEOUT_S = 60
_EXIT_DELAY_S = 3.0
# Words of a collective that failed because another process is gone.
_ERROR_WORDS = ("Gloo", "NCCL", "by peer", "coordination service")


def failed_start_error(
    error: Exception, addresses: dict[str, Any], waited_s: float
) -> UserError:
    """Returns the error to show if `jax.distributed.initialize` failed."""
    reason = f"cannot join the other hosts: {str(error).partition(chr(10))[0]}"
    if waited_s >= START_TIMEOUT_S:  # JAX's own message does not say this
        count = addresses.get("num_processes", "other")
        reason = f"not all {count} processes have started within {waited_s:.0f} s"
    elif isinstance(error, ValueError):
        hint = "" if addresses else "; pass --multihost ADDRESS:PORT COUNT INDEX"
        return UserError(reason + hint)
    # An address that does not resolve yet, or a port that is still in use.
    return RetryableError(f"{reason}; start all processes again")


def lost_host_error(error: BaseException | None) -> RetryableError | None:
    """Returns the error to show if a collective failed because a process is gone."""
    while error is not None and jax.distributed.is_initialized():
        if any(words in str(error) for words in _ERROR_WORDS):
            return RetryableError(
                "another process of this run has failed or cannot be reached; start "
                "all processes again to resume"
            )
        error = error.__cause__ or error.__context__
    return None


def let_others_exit() -> None:
    """Delays the exit of process 0 after an error that other processes may share.

    It runs JAX's coordinator: as soon as it exits, JAX aborts all others.
    """
    if (
        jax.distributed.is_initialized()
        and jax.process_index() == 0
        and jax.process_count() > 1
    ):
        time.sleep(_EXIT_DELAY_S)
