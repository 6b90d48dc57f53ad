"""Whether the other processes of a run are still there, told by name when one is not.

Collectives wait for ever for one that hangs, and what they say of one that died names
no process. So each writes a number that grows into a file of the shared working folder,
and looks at the others': who has not moved for `TIMEOUT_S` is gone, and all others end,
each with one line. One that died on the same machine is noticed at once. With the
number goes how far its main thread has come (`moves`): where none of all comes
any further for `run.hang_timeout_s`, who is behind hangs, and all end. One that was
told to leave says so there, too (`preemption`). Files and not sockets: what all
processes share is the folder.
"""

import contextlib
import functools
import math
import os
import pathlib
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ccu_jax import errors
from ccu_jax.distributed import preemption
from ccu_jax.distributed.hosts import (
    NAMED_S,
    barrier,
    broadcast_from_primary,
    of_a_peer,
    process_index_and_count,
)
from ccu_jax.distributed.moves import moves
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.storage.files import write_atomically

TIMEOUT_S = 60.0
_BEAT_S = 2.0
_LENGTH = 300  # of what is said
_OLD_S = 24 * 3600.0
_GRACE_S = 10.0  # after a peer has failed
_DEAD_S = 4.0  # of silence, where there is no such process any more
_PAUSE_S = 20.0  # between two looks: this process was stopped, or its machine
# How it has ended; `refused`: for a reason that another start would meet again.
_ENDED, _FAILED, _REFUSED, _LEFT = "ended", "failed", "refused", "left"


@contextlib.contextmanager
def watched(workdir: pathlib.Path, stalled_s: float) -> Iterator[None]:
    """While the block runs, this process tells that it is alive, and looks at others.

    Does nothing in a run of one process.

    Args:
        workdir: that all processes share.
        stalled_s: how long none of all processes may come any further.
    """
    index, count = process_index_and_count()
    if count == 1:
        yield
        return
    # A word that another run has left, or is just saying, is none of this one.
    token = int(broadcast_from_primary(np.array(secrets.randbits(31), np.int32)))
    folder = workdir / ".alive" / f"{token:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    if index == 0:
        _tidy(folder.parent)
    watch = Watch(folder, index, count, stalled_s=stalled_s)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    preemption.on_leaving(lambda: watch.end(_LEFT))
    how = _FAILED
    try:
        yield
        barrier("end")  # nobody needs another one after this
        how = _ENDED
    except errors.Preempted:
        how = _LEFT
        raise
    except BaseException as error:
        if of_a_peer(error):  # the watch will name it
            thread.join(NAMED_S)
        told = error if isinstance(error, UserError) else user_error_for(error)
        if told is not None and errors.exit_code(told) == 2:
            how = _REFUSED
        raise
    finally:
        preemption.only_note()
        watch.end(how)
    if index == 0:
        # The others are at once at their end. With the first one goes what JAX's
        # threads in them keep asking.
        watch.wait_for_ends(_GRACE_S)


def _tidy(folder: pathlib.Path) -> None:
    """Removes what runs have left that ended long ago; one at work writes all along."""
    for old in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_S:
                shutil.rmtree(old, ignore_errors=True)


class Watch:
    """One process's beats, and what it has seen of the others'.

    Args:
        folder: of all processes' files.
        index: of this process.
        count: of all.
        timeout_s: how long a peer may be silent.
        stalled_s: how long none of all may come any further.
    """

    def __init__(  # noqa: D107  the class says it
        self,
        folder: pathlib.Path,
        index: int,
        count: int,
        timeout_s: float = TIMEOUT_S,
        stalled_s: float = math.inf,
    ):
        self._folder, self._index, self._timeout_s = folder, index, timeout_s
        self._others = [peer for peer in range(count) if peer != index]
        # What each said last, and since when it has said so.
        self._seen: dict[int, tuple[str, float]] = {}
        self._beats, self._ended = 0, threading.Event()
        self._writing = threading.Lock()
        self._stalled_s = stalled_s
        self._left_s = math.inf  # since when one is known to have left
        # How far each had come last, and since when it has been there.
        self._moved: dict[int, tuple[tuple[int, int], float]] = {}

    def run(self) -> None:
        """Beats until `end`; leaves the process where a peer is lost."""
        while not self._ended.is_set():
            now_s, said = time.monotonic(), self.said()
            self.heed(now_s, said)
            self.beat()
            if lost := self.lost(now_s, said) or self.stalled(now_s, said):
                # Nothing in this process will go on: it waits for the lost one.
                os.write(2, f"error: {lost}\n".encode())
                os._exit(errors.exit_code(lost))
            rests_s = time.monotonic()
            self._ended.wait(_BEAT_S)
            if time.monotonic() - rests_s > _PAUSE_S:
                self.woken()

    def woken(self) -> None:
        """Counts anew: this process was stopped itself, as all others may have been."""
        self._seen.clear()
        self._moved.clear()
        self._left_s = math.inf

    def beat(self) -> None:
        """Tells the others that this process is alive."""
        self._beats += 1
        asked = preemption.shown()
        told = self._beats, *moves(), "" if asked is None else asked
        with self._writing:
            if not self._ended.is_set():
                self._say(":".join(map(str, told)))

    def end(self, how: str) -> None:
        """Tells the others that this process is at its end, and no more."""
        with self._writing:
            self._ended.set()
            self._say(how)

    def wait_for_ends(self, seconds: float) -> None:
        """Waits until all peers are at their end, so long at most."""
        until_s = time.monotonic() + seconds
        while any(_said(text).how != _ENDED for text in self.said().values()):
            if time.monotonic() > until_s:
                return
            time.sleep(0.05)

    def said(self) -> dict[int, str]:
        """What each peer has said last; nothing where it has never been heard of."""
        return {peer: self._read(peer) for peer in self._others}

    def heed(self, now_s: float, said: dict[int, str]) -> None:
        """Leaves with a peer that has left, or agrees with all when to."""
        every = [_said(text) for text in said.values()]
        if any(one.how == _LEFT for one in every):
            # Those who save together end one after another.
            self._left_s = min(now_s, self._left_s)
            if not preemption.settled() or now_s - self._left_s >= _GRACE_S:
                preemption.leave()
        asked = [one.asked for one in every]
        if any(at is not None for at in asked):
            preemption.tell()
        asked.append(preemption.shown())
        if all(at is not None for at in asked):
            preemption.agree(asked)

    def _say(self, how: str) -> None:
        who = f"process {os.getpid()} on {platform.node()}"
        text = f"{_machine()} {how} {who}".ljust(_LENGTH).encode()
        path = self._file(self._index)
        # What is wrong with a disk is told elsewhere; but on one that is full how this
        # process ends shall be heard all the same: that needs no room.
        with contextlib.suppress(OSError):
            try:
                write_atomically(path, text)
            except OSError:
                with path.open("r+b") as file:
                    file.write(text)

    def lost(self, now_s: float, said: dict[int, str]) -> Exception | None:
        """Which peer is lost, in words, or None."""
        for peer, text in said.items():
            before, since_s = self._seen.get(peer, (None, now_s))
            if text != before:
                self._seen[peer] = text, now_s
            elif told := self._told(peer, text, now_s - since_s):
                return told
        return None

    def stalled(self, now_s: float, said: dict[int, str]) -> errors.PeerLost | None:
        """Which process hangs while the others wait for it, in words, or None."""
        every = {self._index: moves()}
        for peer, text in said.items():
            if (at := _said(text).moves) is not None:  # else it is at its end
                every[peer] = at
        for process, at in every.items():
            if at != self._moved.get(process, (None, 0.0))[0]:
                self._moved[process] = at, now_s
        still_s = now_s - max(self._moved[process][1] for process in every)
        if still_s < self._stalled_s:
            return None
        least = min(together for _, together in every.values())
        behind = [p for p, (_, together) in sorted(every.items()) if together == least]
        who = ", ".join(f"process {p}" for p in behind)
        waits = "for which the others wait" if len(behind) < len(every) else "all"
        return errors.PeerLost(
            f"{who} of this run, {waits}, has come no further for {still_s:.0f} s "
            "(run.hang_timeout_s): this one ends; what is done is kept, start all "
            "processes again"
        )

    def _told(self, peer: int, text: str, silent_s: float) -> Exception | None:
        machine, how, who, *_ = _said(text)
        # What ends one process mostly ends all: each shall tell of it by itself.
        allowed_s, what = self._timeout_s, f"is silent for {silent_s:.0f} s"
        if how in (_FAILED, _REFUSED):
            allowed_s, what = _GRACE_S, "has failed"
        elif silent_s >= _DEAD_S and _dead(machine, who):
            allowed_s, what = _DEAD_S, "is there no more"
        if how in (_ENDED, _LEFT) or silent_s < allowed_s:
            return None
        whose = f"process {peer} of this run ({who or 'never heard of'}) {what}"
        if how == _REFUSED:
            return UserError(f"{whose}, and told why: this one ends too")
        return errors.PeerLost(
            f"{whose}: this one ends too; what is done is kept, start all processes "
            "again"
        )

    def _file(self, index: int) -> pathlib.Path:
        return self._folder / str(index)

    def _read(self, peer: int) -> str:
        """What a peer of this run has said last."""
        try:
            return self._file(peer).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""


class _Said(NamedTuple):
    """What a peer has said: where it is, how it is, and who.

    As long as it beats, `moves`: how far it has come; where it was told to leave,
    `asked`: of `preemption.shown`.
    """

    machine: str = ""
    how: str = ""
    who: str = ""
    moves: tuple[int, int] | None = None
    asked: int | None = None


def _said(text: str) -> _Said:
    machine, how, who = (*text.split(" ", 2), "", "", "")[:3]
    try:
        _, alone, together, asked = how.split(":")
        moves = int(alone), int(together)
        return _Said(machine, how, who, moves, int(asked) if asked else None)
    except ValueError:
        return _Said(machine, how, who)


@functools.cache
def _machine() -> str:
    """Where a process's number means this process; `?` where nothing tells."""
    try:
        booted = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A container has numbers of its own.
        return f"{booted}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "?"


def _dead(machine: str, who: str) -> bool:
    """Whether a process of this very machine is known to be no more."""
    words = who.split()
    if machine == "?" or machine != _machine() or len(words) < 2:
        return False
    try:
        state = pathlib.Path(f"/proc/{int(words[1])}/stat").read_text()
        # One that nobody has asked about since its end still has a number.
        return state.rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return True
    except (OSError, ValueError, IndexError):
        return False
