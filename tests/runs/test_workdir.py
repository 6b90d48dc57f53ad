"""Lock, links and files of a working folder."""

import errno
import fcntl
import subprocess
import sys
import types

import pytest

from ccu_jax.errors import RetryableError, UserError
from ccu_jax.runs import workdir
from tests import toy

LOCKING_PROCESS = """
import pathlib, sys
from ccu_jax.runs.workdir import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_lock_of_another_process_holds_until_it_is_killed(tmp_path):
    folder = tmp_path / "a" / "b"  # created by the lock
    owner = subprocess.Popen(
        [sys.executable, "-c", LOCKING_PROCESS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    message = rf"locked by another run \(process {owner.pid} on .*another --workdir"
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=message), workdir.lock_workdir(folder):
            pass
    finally:
        owner.kill()
        owner.communicate()
    with workdir.lock_workdir(folder):
        pass


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with workdir.lock_workdir(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_restarted_hosts_wait_for_a_stale_lock_until_its_lease_ends(
    tmp_path, monkeypatch, capsys
):
    def lock():
        file = (tmp_path / "run.lock").open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    monkeypatch.setattr(workdir, "process_index_and_count", lambda: (0, 2))
    ticks, stale = iter(range(0, 1000, 50)), lock()
    clock = types.SimpleNamespace(
        monotonic=lambda: next(ticks), sleep=lambda seconds: stale.close()
    )
    monkeypatch.setattr(workdir, "time", clock)
    with workdir.lock_workdir(tmp_path):
        assert "locked by another run" in capsys.readouterr().out
    clock.sleep = lambda seconds: None
    with lock(), pytest.raises(RetryableError, match="locked by another run"):
        workdir.lock_workdir(tmp_path).__enter__()


def test_external_link_is_rejected_unless_allowed_and_an_internal_one_is_not(tmp_path):
    work, target = tmp_path / "work", tmp_path / "precious"
    (work / "below").mkdir(parents=True)
    target.touch()
    (work / "internal").symlink_to(work / "below")
    workdir.reject_external_links(work, allow_links=False)
    for name in ("unpacked", "run.lock", "below/events.jsonl"):
        (work / name).symlink_to(target)
        message = f"{name}: symbolic link out of .*run.allow_external_links=True"
        with pytest.raises(UserError, match=message):
            workdir.reject_external_links(work, allow_links=False)
        workdir.reject_external_links(work, allow_links=True)
        (work / name).unlink()


def test_damaged_list_of_unlearn_ids_is_named(tmp_path):
    path = workdir.unlearn_set_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(b"row\xff\n")
    problem, data = toy.make_problem(toy.executors.vmap(1)), toy.make_dataset()
    ctx = toy.make_context(problem, data, tmp_path)
    with pytest.raises(UserError, match="0.txt: damaged or edited; remove it"):
        workdir.unlearn_set_files(ctx, 0, problem.sets)


def test_only_changed_texts_are_written(tmp_path):
    intact, damaged = tmp_path / "sets" / "intact", tmp_path / "sets" / "damaged"
    texts = {intact: "one\n", damaged: "two\n"}
    workdir.write_if_changed(texts)
    modified_ns = intact.stat().st_mtime_ns
    damaged.write_bytes(b"t\xffo\n")
    workdir.write_if_changed(texts)
    assert {path: path.read_text() for path in texts} == texts
    assert intact.stat().st_mtime_ns == modified_ns
