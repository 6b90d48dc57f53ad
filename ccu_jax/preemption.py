"""Leaving when told to (SIGTERM), at a moment on which all processes agree.

A machine that is to be taken away is told so a little before. Whatever is in the
middle of its steps saves a checkpoint then; all else is whole on the disk at any time.
The same command goes on from there.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same again, later
LOST_CODE = 76  # a peer was lost: start all again
MESSAGE = "told to leave (SIGTERM); what is done is kept: the same command goes on"


class Leaving(Exception):
    """All processes leave now."""


class Lost(Exception):
    """Another process of the run is lost, in words: this one leaves, too."""


class _Signal:
    """What has been heard so far by this process."""

    told = False
    working = False
    asked = 0  # the same number in all processes


def install() -> None:
    """Listens to SIGTERM, where nobody else does.

    With several processes JAX does, and tells the others: `due` asks it.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _hear)


def _hear(*_) -> None:
    if _Signal.told or not _Signal.working:
        # Not by an exception: see `launch._stop`.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"{MESSAGE}\n".encode())
        os._exit(EXIT_CODE)
    _Signal.told = True


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While the block runs, one is asked to leave and not made to."""
    _Signal.working = True
    try:
        yield
    finally:
        _Signal.working = False


def due() -> bool:
    """Whether to leave now; every process asks at the same places, and all are told."""
    import jax  # here: the process listens before it knows what devices it shall have

    if jax.process_count() == 1:
        return _Signal.told
    from jax.experimental import multihost_utils

    _Signal.asked += 1
    return multihost_utils.reached_preemption_sync_point(_Signal.asked)
