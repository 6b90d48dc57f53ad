"""Whether the other processes of a run are still there, told by name when one is not.

Collectives wait for ever for one that hangs, and what they say of one that died names
no process. So each writes a number that grows into a file of the shared working folder,
and looks at the others': who has not moved for `TIMEOUT_S` is gone, and all others end,
each with one line. Files and not sockets: what all processes share is the folder.
"""

import contextlib
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator

import jax

from ccu_jax.parallel import place_of_process
from ccu_jax.report import atomically

TIMEOUT_S = 60.0
EXIT_CODE = 76  # a peer was lost: start all again
_BEAT_S = 2.0
_GRACE_S = 10.0  # after a peer has failed
_ENDED, _FAILED = "ended", "failed"


@contextlib.contextmanager
def watched(workdir: pathlib.Path) -> Iterator[None]:
    """While the block runs, this process tells that it is alive, and looks at others.

    Does nothing in a run of one process.
    """
    index, count = place_of_process()
    if count == 1:
        yield
        return
    folder = workdir / ".alive"
    folder.mkdir(exist_ok=True)
    watch = Watch(folder, index, count)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError:
        # A collective that fails has most likely lost a peer: the watch will name it.
        thread.join(TIMEOUT_S + 5 * _BEAT_S)
        watch.end(_FAILED)
        raise
    except BaseException:
        watch.end(_FAILED)
        raise
    watch.end(_ENDED)


class Watch:
    """One process's beats, and what it has seen of the others'.

    Args:
        folder: of all processes' files.
        index: of this process.
        count: of all.
        timeout_s: how long a peer may be silent.
    """

    def __init__(  # noqa: D107  the class says it
        self, folder: pathlib.Path, index: int, count: int, timeout_s=TIMEOUT_S
    ):
        self._folder, self._index, self._timeout_s = folder, index, timeout_s
        self._others = [peer for peer in range(count) if peer != index]
        # What was read of each at first may be left from an earlier run.
        self._seen: dict[int, tuple[str, float]] = {}
        self._beats, self._ended = 0, threading.Event()

    def run(self) -> None:
        """Beats until `end`; leaves the process where a peer is lost."""
        while not self._ended.is_set():
            self.beat()
            if lost := self.lost(time.monotonic()):
                # Nothing in this process will go on: it waits for the lost one.
                os.write(2, f"error: {lost}\n".encode())
                os._exit(EXIT_CODE)
            self._ended.wait(_BEAT_S)

    def beat(self) -> None:
        """Tells the others that this process is alive."""
        self._beats += 1
        text = f"{self._beats} process {os.getpid()} on {platform.node()}"
        # A disk that is full for a while is told of elsewhere.
        with contextlib.suppress(OSError):
            atomically(self._file(self._index), text.encode())

    def end(self, how: str) -> None:
        """Tells the others that this process is at its end, and no more."""
        self._ended.set()
        text = f"{how} process {os.getpid()} on {platform.node()}"
        with contextlib.suppress(OSError):
            atomically(self._file(self._index), text.encode())

    def lost(self, now_s: float) -> str | None:
        """Which peer is lost, in words, or None."""
        for peer in self._others:
            text = self._read(peer)
            before, since_s = self._seen.get(peer, (None, now_s))
            if text != before:
                self._seen[peer] = text, now_s
            elif told := self._told(peer, text, now_s - since_s):
                return told
        return None

    def _told(self, peer: int, text: str, silent_s: float) -> str | None:
        how, _, who = text.partition(" ")
        # What ends one process mostly ends all: each shall tell of it by itself.
        allowed_s = _GRACE_S if how == _FAILED else self._timeout_s
        if how == _ENDED or silent_s < allowed_s:
            return None
        what = "has failed" if how == _FAILED else f"is silent for {silent_s:.0f} s"
        return (
            f"process {peer} of this run ({who or 'never heard of'}) {what}: this one "
            "ends too; what is done is kept, start all processes again"
        )

    def _file(self, index: int) -> pathlib.Path:
        return self._folder / str(index)

    def _read(self, peer: int) -> str:
        try:
            return self._file(peer).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
