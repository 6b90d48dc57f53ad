"""The processes of a run, one for each host: who they are, and what they agree on.

What needs all of them is called by all, at the same places. `peers` tells of those that
are lost, `parallel` gives work to the devices of all.
"""

import contextlib
import ctypes
import functools
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ccu_jax import errors
from ccu_jax.distributed import preemption
from ccu_jax.distributed.moves import moved_together
from ccu_jax.errors import UserError

_SOON_S = 60.0  # who cannot be joined, or seen, by then has not come
_SHOWN_S = 15.0  # after that a file is not in a shared folder
NAMED_S = 70.0  # by then `peers` has told who is lost


def process_index_and_count() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def is_primary() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def join_hosts(hosts: dict[str, str | int]) -> None:
    """Connect to the other processes of this run.

    Args:
        hosts: of `jax.distributed.initialize`; empty where the cluster tells them.

    Raises:
        UserError: nothing tells which they are.
        PeerLost: not all have come in time, or they cannot be joined.
    """
    began = time.monotonic()
    # It would listen to SIGTERM, and tell of it between steps alone: see `preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**hosts)
    except (ValueError, RuntimeError) as error:
        waited = time.monotonic() - began
        if waited > _SOON_S:  # what JAX says then tells nothing
            raise errors.PeerLost(
                f"not all of the {hosts.get('num_processes', 'other')} processes of "
                f"this run have come within {waited:.0f} s: start all of them again"
            ) from error
        reason = f"cannot join the other hosts: {str(error).partition(chr(10))[0]}"
        if isinstance(error, ValueError):
            hint = "" if hosts else "; give ADDRESS:PORT COUNT INDEX after --multihost"
            raise UserError(reason + hint) from error
        # An address that nobody knows yet, say, or a port that is not free yet.
        raise errors.PeerLost(f"{reason}: start all of them again") from error
    if jax.process_count() > 1:
        preemption.only_note()


def is_shared_folder(folder: pathlib.Path) -> bool:
    """Whether all processes see the same folder: what the first puts there."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    mine = np.array(time.time_ns() % 2**31)
    path = folder / f".shared-{multihost_utils.broadcast_one_to_all(mine)}"
    if is_primary():
        path.touch()
    barrier("shared")
    there = all_agree(_comes(path.exists, _SHOWN_S))
    if is_primary():
        path.unlink()
    return there


def wait_until_visible(
    path: pathlib.Path, look: Callable[[], bool] | None = None
) -> bool:
    """Whether the first process sees it; all others then wait until they see it.

    All call this, and get the same answer: what a network's folder shows may be a
    little older in one place than in another.

    Args:
        path: a file or folder.
        look: says whether it is what is wanted; by default that it is there.

    Raises:
        PeerLost: this process does not come to see it.
    """
    look = look or path.exists
    if not broadcast_from_primary(np.array(look(), np.int32)):
        return False
    if not _comes(look, _SOON_S):
        raise errors.PeerLost(
            f"{path}, which process 0 sees, has not come here within {_SOON_S:.0f} s: "
            "is --workdir one folder that all processes share? Start all of them again"
        )
    return True


def _comes(look: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def all_agree(truth: bool) -> bool:
    """Whether every process says so; all call this, and get the same answer."""
    moved_together()
    if jax.process_count() == 1:
        return bool(truth)
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(truth)).all())


def broadcast_from_primary(array: np.ndarray) -> np.ndarray:
    """What the first process has for an array of 32-bit numbers; all call this."""
    moved_together()
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def barrier(name: str) -> None:
    """Wait until every process is here."""
    moved_together()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def failed(error: BaseException | None) -> errors.PeerLost | None:
    """Says that a collective has failed, as it does where a peer is lost; else None.

    For the time before `peers.watched`, and where it could name nobody.
    """
    if process_index_and_count()[1] == 1 or not of_a_peer(error, surely=True):
        return None
    return errors.PeerLost(
        "another process of this run was lost, or could not be reached: this one ends "
        "too; what is done is kept, start all processes again"
    )


def of_a_peer(error: BaseException | None, surely: bool = False) -> bool:
    """Whether a collective has failed, which most likely has lost a peer."""
    while error is not None:
        told = str(error)
        if "RESOURCE_EXHAUSTED" in told:
            return False
        # JAX has more than one kind for it, and so has Orbax.
        if isinstance(error, jax.errors.JaxRuntimeError) and not surely:
            return True
        if any(word in told for word in ("Gloo", "by peer", "coordination service")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """While the block runs, JAX joins in such a way that it does not end this process.

    Else it does so as soon as process 0 is lost, with a trace of its stack, and names
    nobody. What waits for process 0 fails or hangs all the same: `peers.watched` tells.
    """
    try:
        from jax._src import distributed

        made = distributed._jax.get_distributed_runtime_client
        _wait_before_the_end()
    except (ImportError, AttributeError, OSError):  # elsewhere it does end the process
        yield
        return
    distributed._jax.get_distributed_runtime_client = functools.partial(
        made, missed_heartbeat_callback=lambda *told: None
    )
    try:
        yield
    finally:
        distributed._jax.get_distributed_runtime_client = made


_kept: list = []  # what C++ calls must not be collected


def _wait_before_the_end() -> None:
    """Lets a thread of C++ that has failed wait until the lost peer has been named.

    jaxlib 0.10 cannot give a status to Python: its callback fails where it is called,
    which would end the process. Where nobody is lost, it ends as it would have.
    """
    function = ctypes.CFUNCTYPE(None)
    change = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    change.restype, change.argtypes = ctypes.c_void_p, [function]

    def wait():
        time.sleep(NAMED_S)
        function(before)()

    _kept.append(function(wait))
    before = change(_kept[-1])
