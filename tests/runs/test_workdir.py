"""The lock of a working folder."""

import errno
import fcntl
import subprocess
import sys
import time
import types

import pytest

from ccu_jax.errors import RetryableError, UserError
from ccu_jax.runs import workdir as workdirs

OTHER = (
    "import pathlib, sys\n"
    "from ccu_jax.runs import workdir as workdirs\n"
    "with workdirs.lock_workdir(pathlib.Path(sys.argv[1])):\n"
    "    print('mine', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_a_folder_that_is_not_there_yet_can_be_locked_and_again_later(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with workdirs.lock_workdir(folder):
            assert (folder / "run.lock").read_text().startswith("process ")


def test_a_folder_that_another_process_has_is_refused_until_it_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .*another --w"):
            with workdirs.lock_workdir(tmp_path):
                pass
    finally:
        other.kill()  # a lock goes with who had it, however that ends
        other.communicate()
    with workdirs.lock_workdir(tmp_path):
        pass


def test_what_a_kill_has_left_of_a_file_goes_and_all_else_stays(tmp_path):
    (tmp_path / "stages").mkdir()
    left, own = tmp_path / "stages" / ".ccu-0.json.4711.tmp", tmp_path / ".my.tmp"
    left.touch()
    own.touch()
    with workdirs.lock_workdir(tmp_path):
        assert not left.exists() and own.exists()


@pytest.mark.parametrize("name", ["unpacked", "run.lock", "below/events.jsonl"])
def test_links_out_of_the_folder_are_refused_and_what_they_lead_to_is_whole(
    tmp_path, name
):
    work, other = tmp_path / "work", tmp_path / "precious"
    (work / "below").mkdir(parents=True)
    other.write_text("mine")
    (work / name).symlink_to(other)
    with pytest.raises(
        UserError, match=f"{name} is a link out of .*run.allow_external_links=True"
    ):
        workdirs.reject_external_links(work, links=False)
    assert other.read_text() == "mine"
    (work / name).unlink()
    (work / name).symlink_to(work / "below")  # one that stays within is fine
    if name == "unpacked":
        workdirs.reject_external_links(work, links=False)


def test_who_has_made_a_link_may_have_it(tmp_path):
    work, far = tmp_path / "work", tmp_path / "far"
    work.mkdir()
    far.mkdir()
    (work / "data").symlink_to(far)
    workdirs.reject_external_links(work, links=True)
    with pytest.raises(UserError, match="data is a link out of"):
        workdirs.reject_external_links(work, links=False)


def test_a_folder_that_cannot_be_locked_is_said_to_be(tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with workdirs.lock_workdir(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_what_is_started_again_at_once_waits_for_what_is_left_of_itself(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(workdirs, "process_index_and_count", lambda: (0, 2))
    held = (tmp_path / "run.lock").open("a+b")
    fcntl.flock(held, fcntl.LOCK_EX)
    clock = types.SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda s: held.close()
    )
    monkeypatch.setattr(workdirs, "time", clock)
    with workdirs.lock_workdir(tmp_path):
        assert "another run is at work" in capsys.readouterr().out
    held = (tmp_path / "run.lock").open("a+b")
    fcntl.flock(held, fcntl.LOCK_EX)
    ticks = iter(range(0, 1000, 50))
    clock.monotonic, clock.sleep = lambda: next(ticks), lambda s: None
    with held, pytest.raises(RetryableError, match="another run is at work"):
        with workdirs.lock_workdir(tmp_path):
            pass


def test_a_damaged_list_of_what_is_forgotten_is_one_line(tmp_path, monkeypatch):
    path = workdirs.unlearn_set_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(b"row\xff\n")
    monkeypatch.setattr(
        workdirs.unlearn_set, "format_unlearn_set", lambda *args: "row1\n"
    )
    unlearn = types.SimpleNamespace(rule="random:0.1", duplicates="forget")
    config = types.SimpleNamespace(unlearn=unlearn)
    bench = types.SimpleNamespace(workdir=tmp_path, config=config, data=None)
    with pytest.raises(UserError, match="0.txt is damaged, or was changed: remove it"):
        workdirs.unlearn_set_files(bench, 0, types.SimpleNamespace(unlearn=[1]))


def test_a_text_that_was_damaged_is_written_anew_and_others_are_left_alone(tmp_path):
    whole, damaged = tmp_path / "sets" / "whole", tmp_path / "sets" / "damaged"
    texts = {whole: "one\n", damaged: "two\n"}
    workdirs.write_if_changed(texts)
    before = whole.stat().st_mtime_ns
    damaged.write_bytes(b"t\xffo\n")
    workdirs.write_if_changed(texts)
    assert {path: path.read_text() for path in texts} == texts
    assert whole.stat().st_mtime_ns == before
