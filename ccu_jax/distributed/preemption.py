"""Leaving when told to (SIGTERM), at a moment on which all processes agree.

A machine that is to be taken away is told so a little before. Whatever is in the
middle of its steps saves a checkpoint then; all else is whole on the disk at any time,
and left at once. The same command goes on from there.

Processes tell each other through `peers.Watch`, and agree without waiting for the
devices: each lets the others know how often it has asked whether it is time (`due`),
and passes no further before all have; they leave when they ask for the first time
that none of them had passed.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ccu_jax.errors import RETRY_EXIT_CODE

MESSAGE = "told to leave (SIGTERM); what is done is kept: the same command goes on"


class _Word:
    """What this process has heard, and what it has agreed on with the others."""

    told = False
    working = False  # it is only noted
    asked = 0  # how often `due` was asked: the same things, in all processes
    shown: int | None = None  # what `asked` was when the others were told
    last: int | None = None  # `asked` when all leave
    goodbye: Callable[[], None] | None = None


_counting = threading.Lock()
_leaving = threading.Lock()
_agreed = threading.Event()


def install() -> None:
    """Listens to SIGTERM, where nobody else does."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    # The main thread would hear of it only when it is back from compiling, or from
    # waiting for another process.
    heard, hears = os.pipe()
    os.set_blocking(hears, False)
    signal.set_wakeup_fd(hears, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def _listen(pipe: int) -> None:
    while number := os.read(pipe, 1):
        if number[0] == signal.SIGTERM:
            tell()


def tell() -> None:
    """Notes that this process shall leave; it does so now, if it is not `working`."""
    if not _Word.told:
        _Word.told = True
        if not _Word.working:
            leave()


def leave() -> NoReturn:
    """Ends the process, from whichever thread.

    Not by an exception: see `launch._exit_on_interrupt`.
    """
    _leaving.acquire()  # once
    if _Word.goodbye is not None:
        _Word.goodbye()
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(RETRY_EXIT_CODE)


def only_note() -> None:
    """Until `on_leaving` only notes that it shall leave.

    With other processes around of which none would be told by this one: they would wait
    for it, at the beginning for what it is to give, at the end for its end.
    """
    _Word.working = True


def on_leaving(goodbye: Callable[[], None]) -> None:
    """Sets what `leave` does before it ends the process, as it may from now on."""
    _Word.goodbye = goodbye
    _Word.working = False
    if _Word.told:
        leave()


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While the block runs, one is asked to leave and not made to."""
    _Word.working = True
    try:
        yield
    finally:
        _Word.working = False
    if _Word.told:
        leave()


def due(last: bool = False) -> bool:
    """Whether to leave now; every process asks at the same places, and all are told.

    Args:
        last: whether nobody will ask again in this block of `working`.
    """
    import jax  # here: the process listens before it knows what devices it shall have

    if jax.process_count() == 1:
        return _Word.told
    if last:
        from ccu_jax.distributed.hosts import all_agree

        if all_agree(not _Word.told):
            return False
    else:
        with _counting:
            _Word.asked += 1
            now, passes = _Word.asked, _Word.shown is None
        if passes:
            return False
        _agreed.wait()
        if now < _Word.last:
            return False
    _Word.told = True  # what else is heard of it says nothing new
    _agreed.set()
    return True


def shown() -> int | None:
    """What the others are told where this one was told to leave: how often it asked."""
    if not _Word.told:
        return None
    with _counting:
        if _Word.shown is None:
            _Word.shown = _Word.asked
        return _Word.shown


def agree(asked: list[int]) -> None:
    """Notes what all have `shown`, this process included."""
    if _Word.last is None:
        _Word.last = max(asked) + 1
        _agreed.set()


def settled() -> bool:
    """Whether it is known when all leave: until then nobody need be waited for."""
    return _agreed.is_set()
