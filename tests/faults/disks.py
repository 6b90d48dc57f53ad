"""Full disks, read-only disks, and folders that are removed during a run.

Uses a small tmpfs or a read-only mount in a separate mount namespace.
"""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import time

from tests.faults.runs import find_stage
from tests.faults.world import Case, assert_one_line

_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@functools.cache
def can_mount() -> bool:
    """Returns whether an unprivileged user can mount a tmpfs in a namespace."""
    script = f"mount -t tmpfs -o size=1m none {shlex.quote(os.getcwd())}"
    try:
        process = subprocess.run([*_NAMESPACE, "sh", "-c", script], capture_output=True)
    except OSError:
        return False
    return process.returncode == 0


def fill_disk(case: Case) -> None:
    """Fills the disk at a random moment and frees it before the rerun."""
    _disturb_disk(case, "dd if=/dev/zero of=$0/.ballast bs=4k", "o space left")


def make_read_only(case: Case) -> None:
    """Makes the folder read-only before the start, or a part of it during the run."""
    if case.number % 3:
        part = "$0/checkpoints"
        script = f"mount --bind {part} {part} && mount -o remount,bind,ro {part}"
        return _disturb_disk(case, script, "ead-only file system")
    undisturbed = case.world.run_undisturbed(*case.world.audit_flags)
    case.copy_from(undisturbed.workdir)
    if case.rng.random() < 0.7:
        shutil.rmtree(case.workdir / "stages")
    folder = shlex.quote(str(case.workdir))
    script = f"mount --bind -o ro {folder} {folder} && "
    script += f'mount -o remount,bind,ro {folder} && exec "$@"'
    prefix = (*_NAMESPACE, "sh", "-c", script, "sh")
    run = case.start(*case.world.audit_flags, prefix=prefix)
    run.wait()
    case.faults.append("before the start")
    assert_one_line(run, 2, str(case.workdir))
    case.assert_resumes(undisturbed, *case.world.audit_flags)


def _disturb_disk(case: Case, script: str, words: str) -> None:
    """Runs the command on a small tmpfs and executes a shell script at a random moment.

    In `script`, `$0` is the folder; `words` are part of the expected error. The content
    of the tmpfs is copied at the end.
    """
    undisturbed = case.world.run_undisturbed(*case.world.purge_flags)
    case.workdir.mkdir()
    signal_file, copy = case.folder / "disturb", case.folder / "copy"
    start = shlex.quote(str(signal_file))
    command = (
        f"mount -t tmpfs -o size=64m none $0 || exit 70; "
        f"( while [ ! -e {start} ]; do sleep 0.02; done; {script} ) 2>/dev/null & "
        f'"$@"; code=$?; touch {start}; wait; rm -f $0/.ballast; '
        f"cp -a $0 {shlex.quote(str(copy))}; exit $code"
    )
    prefix = (*_NAMESPACE, "sh", "-c", command, str(case.workdir))
    run = case.start(*case.world.purge_flags, prefix=prefix)
    # A mount in another namespace is visible through a process in it.
    inside = pathlib.Path(f"/proc/{run.pid}/root{case.workdir}")
    case.wait_for_moment(run, undisturbed, inside)
    signal_file.touch()
    run.wait()
    case.workdir.rmdir()
    copy.rename(case.workdir)
    if run.exit_code() == 0:  # the run had finished writing
        return case.assert_same(undisturbed)
    case.faults.append(find_stage(case.workdir))
    assert_one_line(run, 2, words)
    case.assert_resumes(undisturbed, *case.world.purge_flags)


def remove_folder(case: Case) -> None:
    """Removes the working folder during a run."""
    undisturbed = case.world.run_undisturbed(*case.world.purge_flags)
    run = case.start(*case.world.purge_flags)
    case.wait_for_moment(run, undisturbed)
    if run.exit_code() is not None:
        return
    stage, end_s = find_stage(case.workdir), time.monotonic() + 5
    while case.workdir.exists() and time.monotonic() < end_s:
        shutil.rmtree(case.workdir, ignore_errors=True)
    if run.wait() == 0:  # the run had finished writing
        return
    case.faults.append(stage)
    assert_one_line(run, 2, str(case.workdir))
    shutil.rmtree(case.workdir, ignore_errors=True)
    case.assert_resumes(undisturbed, *case.world.purge_flags)
