"""Disks that are full or read-only, and folders that are removed during a run.

A small tmpfs or a read-only mount, in a mount namespace of the case.
"""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import time

from tests.faults.kills import wait_for_moment
from tests.faults.runs import Start, current_stage
from tests.faults.world import Case, assert_one_line

_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@functools.cache
def can_mount() -> bool:
    """Whether this machine lets a user mount a disk in a namespace."""
    script = f"mount -t tmpfs -o size=1m none {shlex.quote(os.getcwd())}"
    try:
        done = subprocess.run([*_NAMESPACE, "sh", "-c", script], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def full(case: Case) -> None:
    """Another program fills the disk at some moment; then space is freed again."""
    _disturb(case, "dd if=/dev/zero of=$0/.ballast bs=4k", "o space left")


def _disturb(case: Case, script: str, words: str) -> None:
    """Disturbs the disk at some moment, until the run ends.

    `script`: of a shell, `$0` is the folder; `words`: of the error.
    """
    undisturbed = case.world.undisturbed(*case.world.purged)
    case.workdir.mkdir()
    run = case.start(*case.world.purged, how=Start(prefix=_on_tmpfs(case, script)))
    # Folders of another namespace are seen by way of a process in it.
    inside = pathlib.Path(f"/proc/{run.pid}/root{case.workdir}")
    wait_for_moment(case, run, undisturbed, inside)
    (case.folder / "fill").touch()
    run.wait()
    case.workdir.rmdir()
    (case.folder / "kept").rename(case.workdir)
    if run.code() == 0:  # it had written all
        return case.assert_same(undisturbed)
    case.faults.append(current_stage(case.workdir))
    assert_one_line(run, 2, words)
    case.assert_resumes(undisturbed, *case.world.purged)


def read_only(case: Case) -> None:
    """The folder cannot be written before the start, or a part of it in mid-run."""
    if case.number % 3:
        part = "$0/checkpoints"
        script = f"mount --bind {part} {part} && mount -o remount,bind,ro {part}"
        return _disturb(case, script, "ead-only file system")
    undisturbed = case.world.undisturbed(*case.world.audited)
    case.copy_from(undisturbed.workdir)
    if case.rng.random() < 0.7:
        shutil.rmtree(case.workdir / "stages")
    script = (
        f"mount --bind -o ro {_quoted(case)} {_quoted(case)}"
        f" && mount -o remount,bind,ro {_quoted(case)}"
    )
    run = case.start(*case.world.audited, how=Start(prefix=_within(script)))
    run.wait()
    case.faults.append("before the start")
    assert_one_line(run, 2, str(case.workdir))
    case.assert_resumes(undisturbed, *case.world.audited)


def removed(case: Case) -> None:
    """The folder is removed under a run."""
    undisturbed = case.world.undisturbed(*case.world.purged)
    run = case.start(*case.world.purged)
    wait_for_moment(case, run, undisturbed)
    if run.code() is not None:
        return
    at = current_stage(case.workdir)
    end = time.monotonic() + 5
    while case.workdir.exists() and time.monotonic() < end:
        shutil.rmtree(case.workdir, ignore_errors=True)
    run.wait()
    if run.code() == 0:  # it had written all, and has shown it
        return
    case.faults.append(at)
    assert_one_line(run, 2, str(case.workdir))
    shutil.rmtree(case.workdir, ignore_errors=True)
    case.assert_resumes(undisturbed, *case.world.purged)


def _quoted(case):
    return shlex.quote(str(case.workdir))


def _within(script):
    """Returns a prefix that runs a script in a namespace before the command."""
    return (*_NAMESPACE, "sh", "-c", f'{script} && exec "$@"', "sh")


def _on_tmpfs(case, script):
    """Returns a prefix that runs a command on a small disk of its own.

    The script runs when a file `fill` appears; at the end the content is copied.
    """
    fill, kept = (shlex.quote(str(case.folder / name)) for name in ("fill", "kept"))
    command = (
        f"mount -t tmpfs -o size=64m none $0 || exit 70; "
        f"( while [ ! -e {fill} ]; do sleep 0.02; done; {script} ) 2>/dev/null & "
        f'"$@"; code=$?; touch {fill}; wait; rm -f $0/.ballast; '
        f"cp -a $0 {kept}; exit $code"
    )
    return (*_NAMESPACE, "sh", "-c", command, str(case.workdir))
