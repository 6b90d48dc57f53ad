"""Disks that are full, cannot be written, or vanish while a run is at work.

Real ones: a small tmpfs, or a read-only mount, in a mount namespace of the case's own.
"""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import time

from tests.faults.kills import moment
from tests.faults.runs import Start, where
from tests.faults.world import Case, one_line

_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@functools.cache
def possible() -> bool:
    """Whether this machine lets a user mount things in a namespace."""
    script = f"mount -t tmpfs -o size=1m none {shlex.quote(os.getcwd())}"
    try:
        done = subprocess.run([*_NAMESPACE, "sh", "-c", script], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def full(case: Case) -> None:
    """Another program fills the disk at some moment; then space is freed again."""
    _struck(case, "dd if=/dev/zero of=$0/.ballast bs=4k", "o space left")


def _struck(case: Case, blow: str, words: str) -> None:
    """Something befalls the disk at some moment, and is over with the run.

    `blow`: a shell's words, `$0` is the folder; `words`: what the error must have.
    """
    undisturbed = case.world.undisturbed(*case.world.whole)
    case.workdir.mkdir()
    run = case.start(*case.world.whole, how=Start(before=_on_tmpfs(case, blow)))
    # Folders of another namespace are seen by way of a process in it.
    inside = pathlib.Path(f"/proc/{run.pid}/root{case.workdir}")
    moment(case, run, undisturbed, inside)
    (case.folder / "fill").touch()
    run.wait()
    case.workdir.rmdir()
    (case.folder / "kept").rename(case.workdir)
    if run.code() == 0:  # it had written all
        return case.same(undisturbed)
    case.faults.append(where(case.workdir))
    one_line(run, 2, words)
    case.ends_like(undisturbed, *case.world.whole)


def read_only(case: Case) -> None:
    """The folder cannot be written before the start, or a part of it in mid-run."""
    if case.number % 3:
        part = "$0/checkpoints"
        blow = f"mount --bind {part} {part} && mount -o remount,bind,ro {part}"
        return _struck(case, blow, "ead-only file system")
    undisturbed = case.world.undisturbed(*case.world.audited)
    case.copied(undisturbed)
    if case.draw.random() < 0.7:
        shutil.rmtree(case.workdir / "stages")
    script = (
        f"mount --bind -o ro {_quoted(case)} {_quoted(case)}"
        f" && mount -o remount,bind,ro {_quoted(case)}"
    )
    run = case.start(*case.world.audited, how=Start(before=_within(script)))
    run.wait()
    case.faults.append("before the start")
    one_line(run, 2, str(case.workdir))
    case.ends_like(undisturbed, *case.world.audited)


def vanished(case: Case) -> None:
    """The folder is removed under a run."""
    undisturbed = case.world.undisturbed(*case.world.whole)
    run = case.start(*case.world.whole)
    moment(case, run, undisturbed)
    if run.code() is not None:
        return
    at = where(case.workdir)
    end = time.monotonic() + 5
    while case.workdir.exists() and time.monotonic() < end:
        shutil.rmtree(case.workdir, ignore_errors=True)
    run.wait()
    if run.code() == 0:  # it had written all, and has shown it
        return
    case.faults.append(at)
    one_line(run, 2, str(case.workdir))
    shutil.rmtree(case.workdir, ignore_errors=True)
    case.ends_like(undisturbed, *case.world.whole)


def _quoted(case):
    return shlex.quote(str(case.workdir))


def _within(script):
    """Words before a command that prepare the namespace by a script."""
    return (*_NAMESPACE, "sh", "-c", f'{script} && exec "$@"', "sh")


def _on_tmpfs(case, blow):
    """A disk of its own; what lies there at the end is copied to a large one.

    When there is a file `fill`, the blow falls.
    """
    fill, kept = (shlex.quote(str(case.folder / name)) for name in ("fill", "kept"))
    script = (
        f"mount -t tmpfs -o size=64m none $0 || exit 70; "
        f"( while [ ! -e {fill} ]; do sleep 0.02; done; {blow} ) 2>/dev/null & "
        f'"$@"; code=$?; touch {fill}; wait; rm -f $0/.ballast; '
        f"cp -a $0 {kept}; exit $code"
    )
    return (*_NAMESPACE, "sh", "-c", script, str(case.workdir))
