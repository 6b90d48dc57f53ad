"""Peers that are alive, ended or lost; a lost one is named within the stated time."""

import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import pytest

from ccu_jax import errors, launch
from ccu_jax.distributed import hosts as processes
from ccu_jax.distributed import peers, preemption
from ccu_jax.errors import RetryableError, UserError


def pair(tmp_path):
    return [peers.Watch(tmp_path, index, 2, timeout_s=10.0) for index in range(2)]


def lost(watch, now_s):
    return watch.lost(now_s, watch.said())


def stalled(watch, now_s):
    return watch.stalled(now_s, watch.said())


def test_a_peer_that_beats_is_not_lost_and_one_that_is_silent_is_named(tmp_path):
    one, two = pair(tmp_path)
    for now_s in range(0, 40, 5):
        one.beat()
        two.beat()
        assert lost(one, now_s) is None and lost(two, now_s) is None
    for now_s in (40, 44):
        two.beat()
        assert lost(one, now_s) is None and lost(two, now_s) is None
    told = str(lost(two, 46))
    assert told.startswith("process 0 of this run (process ")
    assert "silent for 11 s" in told
    assert lost(one, 46) is None


def test_who_is_behind_hangs_where_none_comes_any_further(tmp_path, monkeypatch):
    at = [(0, 5), (0, 7), (9, 7)]
    watches = [peers.Watch(tmp_path, index, 3, stalled_s=20.0) for index in range(3)]

    def told(now_s):
        found = []
        for index, watch in enumerate(watches):
            monkeypatch.setattr(peers, "moves", lambda index=index: at[index])
            watch.beat()
        for index, watch in enumerate(watches):
            monkeypatch.setattr(peers, "moves", lambda index=index: at[index])
            found.append((told := stalled(watch, now_s)) and str(told))
        return found

    assert told(0.0) == told(19.0) == [None] * 3
    at[2] = (10, 7)  # one at work is enough, as in preparing: the others wait for it
    assert told(25.0) == told(44.0) == [None] * 3
    found = told(45.0)
    assert len(set(found)) == 1 and found[0].startswith(
        "process 0 of this run, for which the others wait, has come no further for 20 s"
    )
    at[:2] = [(0, 7)] * 2
    assert told(50.0) == [None] * 3
    assert told(70.0)[0].startswith("process 0, process 1, process 2 of this run, all,")
    watches[1].end("ended")
    # One that has ended is not waited for, but the others may wait for each other.
    assert stalled(watches[0], 69.0) is None
    assert str(stalled(watches[0], 99.0)).startswith("process 0, process 2 of this run")


def test_one_that_ended_well_is_not_missed_and_one_that_never_came_is(tmp_path):
    one, two = pair(tmp_path)
    two.beat()
    two.end("ended")
    for now_s in (0, 20, 40):
        assert lost(one, now_s) is None
    two.end("failed")
    assert lost(one, 50) is None
    told = str(lost(one, 61))
    assert "process 1 of this run (process " in told and "has failed" in told
    (tmp_path / "other").mkdir()
    alone = peers.Watch(tmp_path / "other", 0, 3, timeout_s=10.0)
    assert lost(alone, 0) is None
    assert "process 1 of this run (never heard of)" in str(lost(alone, 10))


def test_what_would_be_met_again_ends_the_others_for_good(tmp_path):
    one, two = pair(tmp_path)
    two.beat()
    assert lost(one, 0) is None
    two.end("refused")
    assert lost(one, 1) is None and lost(one, 9) is None
    told = lost(one, 12)
    assert errors.exit_code(told) == 2
    assert "process 1 of this run (process " in str(told) and "told why" in str(told)


def test_the_first_process_ends_last(tmp_path):
    one, two = pair(tmp_path)
    two.beat()
    began = time.monotonic()
    one.wait_for_ends(0.3)  # not for ever
    assert 0.3 < time.monotonic() - began < 10
    threading.Timer(0.3, two.end, ["ended"]).start()
    one.wait_for_ends(60)
    assert 0.5 < time.monotonic() - began < 30


@pytest.mark.parametrize(
    "error, how",
    [
        (UserError("no such class"), "refused"),
        (OSError(errno.ENOSPC, "full"), "refused"),
        (RetryableError("later"), "failed"),
        (OSError(errno.ESTALE, "stale"), "failed"),
        (RuntimeError("bug"), "failed"),
        (errors.Preempted(), "left"),
        (None, "ended"),
    ],
)
def test_how_it_ends_is_told_to_the_others(tmp_path, monkeypatch, error, how):
    monkeypatch.setattr(peers, "process_index_and_count", lambda: (0, 2))
    monkeypatch.setattr(peers.Watch, "run", lambda watch: None)
    monkeypatch.setattr(peers.Watch, "wait_for_ends", lambda watch, seconds: None)
    with contextlib.suppress(UserError, OSError, RuntimeError, errors.Preempted):
        with peers.watched(tmp_path, 900.0):
            if error is not None:
                raise error
    (folder,) = (tmp_path / ".alive").iterdir()
    assert (folder / "0").read_text().split(" ")[1] == how


def test_who_was_stopped_itself_counts_the_silence_of_others_anew(tmp_path):
    one, two = pair(tmp_path)
    two.beat()
    assert lost(one, 0) is None and stalled(one, 0) is None
    one.woken()  # as are all others, a little later
    assert lost(one, 1200) is None and lost(one, 1209) is None
    assert "process 1" in str(lost(one, 1211))


def test_what_an_earlier_run_has_left_is_no_sign_of_life(tmp_path):
    one, two = pair(tmp_path)
    two.beat()
    later, _ = pair(tmp_path)
    assert lost(later, 100) is None
    assert "process 1" in str(lost(later, 111))


def test_a_watch_that_was_stopped_itself_begins_anew(tmp_path, monkeypatch):
    watch, two = peers.Watch(tmp_path, 0, 2, timeout_s=10.0), pair(tmp_path)[1]
    two.beat()
    now_s, rests = [0.0], iter([2.0, 1200.0, 2.0, 2.0])

    class Ended:
        def is_set(self):
            return now_s[0] > 1205

        def wait(self, seconds):
            now_s[0] += next(rests)

    def leaves(code):
        raise AssertionError(f"left with {code}")

    clock = types.SimpleNamespace(monotonic=lambda: now_s[0])
    monkeypatch.setattr(peers, "time", clock)
    monkeypatch.setattr(peers.os, "_exit", leaves)
    watch._ended = Ended()
    watch.run()
    assert now_s == [1206.0]
    watch.woken()
    now_s[0], rests = 0.0, iter([2.0] * 9)  # without a stop it is lost
    with pytest.raises(AssertionError, match="left with 76"):
        watch.run()


def test_on_a_disk_without_room_the_others_still_hear_how_it_ends(
    tmp_path, monkeypatch
):
    one, two = pair(tmp_path)
    two.beat()
    assert lost(one, 0) is None
    before = (tmp_path / "1").stat()

    def full(path, content):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(peers, "write_atomically", full)
    two.end("refused")
    assert (tmp_path / "1").stat().st_size == before.st_size
    assert lost(one, 1) is None
    assert errors.exit_code(lost(one, 12)) == 2


def test_runs_do_not_hear_each_other_and_remove_only_what_ended_long_ago(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(peers, "process_index_and_count", lambda: (0, 2))
    monkeypatch.setattr(peers.Watch, "run", lambda watch: None)
    monkeypatch.setattr(peers.Watch, "wait_for_ends", lambda watch, seconds: None)
    old, other = tmp_path / ".alive" / "old", tmp_path / ".alive" / "other"
    for folder in (old, other):
        folder.mkdir(parents=True)
        (folder / "1").write_text("? left process 7 on a-host")
    os.utime(old, (0, 0))
    made = []
    init = peers.Watch.__init__
    monkeypatch.setattr(
        peers.Watch,
        "__init__",
        lambda watch, *args, **more: made.append(watch) or init(watch, *args, **more),
    )
    for _ in range(2):
        with peers.watched(tmp_path, 900.0):
            made[-1].heed(0.0, made[-1].said())  # would leave
    assert other.exists() and not old.exists()
    assert len(list((tmp_path / ".alive").iterdir())) == 3


STEPS = """
import pathlib, sys, time
import jax
from ccu_jax.distributed import peers, preemption
folder, index, count, step_s, idle = sys.argv[1:]
jax.process_count = lambda: int(count)
peers._BEAT_S = 0.1
preemption.install()
watch = peers.Watch(pathlib.Path(folder), int(index), int(count))
peers.threading.Thread(target=watch.run, daemon=True).start()
preemption.on_leaving(lambda: watch.end("left"))

def together(name):
    (watch._folder / f"{name}-{index}").touch()
    while len(list(watch._folder.glob(f"{name}-*"))) < int(count):
        time.sleep(0.01)

together("begins")
if idle == "idle":
    print("begun", flush=True)
    time.sleep(60)
with preemption.working():
    for step in range(100_000):
        time.sleep(float(step_s))
        if step == 3:
            print("begun", flush=True)
        if preemption.due():
            print(step, flush=True)
            together("saves")
            watch.end("left")
            preemption.os._exit(3)
"""


@pytest.mark.parametrize("idle, told", [(None, 0), (None, 1), (2, 0), (0, 1)])
def test_all_leave_after_the_same_step_or_at_once_where_one_is_at_none(
    tmp_path, idle, told
):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STEPS, str(tmp_path), str(index), "3", step_s]
            + ["idle" if index == idle else "steps"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, step_s in enumerate(["0.005", "0.01", "0.02"])
    ]
    for process in processes:
        assert process.stdout.readline() == "begun\n"
    processes[told].send_signal(signal.SIGTERM)
    found = [process.communicate(timeout=30) for process in processes]
    codes = [process.returncode for process in processes]
    if idle is None:
        assert codes == [3, 3, 3], found
        assert len({int(out) for out, _ in found}) == 1 and not any(
            err for _, err in found
        )
    else:
        assert codes == [75, 75, 75], found
        assert {err.strip() for _, err in found} == {preemption.MESSAGE}


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_process_of_this_machine_that_was_killed_is_noticed_at_once(
    tmp_path, waited_for
):
    code = (
        "import pathlib, sys, time\n"
        "from ccu_jax.distributed import peers\n"
        "peers.Watch(pathlib.Path(sys.argv[1]), 1, 2).beat()\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        watch = peers.Watch(tmp_path, 0, 2)
        assert lost(watch, 0) is None and lost(watch, 10) is None
        process.kill()
        if waited_for:
            process.wait()
        while pathlib.Path(f"/proc/{process.pid}/stat").exists():
            if pathlib.Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z":
                break
        told = str(lost(watch, 11))
        assert f"(process {process.pid} on " in told and "is there no more" in told


def test_a_process_of_another_machine_is_dead_only_by_its_silence(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (tmp_path / "1").write_text(f"elsewhere/4 7 process {process.pid} on a-host")
    watch = peers.Watch(tmp_path, 0, 2)
    assert lost(watch, 0) is None and lost(watch, 59) is None
    assert "(process" in str(lost(watch, 61))


def test_what_a_collective_says_of_a_lost_peer_is_told_from_other_errors():
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    assert processes.of_a_peer(lost)
    assert processes.of_a_peer(jax.errors.JaxRuntimeError("INTERNAL"))
    try:
        raise RuntimeError("a checkpoint failed") from lost
    except RuntimeError as error:
        assert processes.of_a_peer(error)
    assert not processes.of_a_peer(ValueError("shapes"))
    assert not processes.of_a_peer(KeyboardInterrupt())


def test_a_collective_that_fails_is_one_line_with_76_and_no_other_error_is(
    monkeypatch, capsys
):
    told_of = [ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")]

    def fail(argv):
        raise told_of[-1]

    monkeypatch.setattr(launch, "_main", fail)
    monkeypatch.setattr(processes, "process_index_and_count", lambda: (0, 2))
    assert launch.main([]) == 76
    told = capsys.readouterr().err
    assert told.startswith("error: another process") and told.count("\n") == 1
    # Memory that is full is told as such, and one process has no others to lose.
    told_of.append(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert launch.main([]) == 2 and "out of memory" in capsys.readouterr().err
    told_of.append(told_of[0])
    monkeypatch.setattr(processes, "process_index_and_count", lambda: (0, 1))
    with pytest.raises(ValueError, match="Gloo"):
        launch.main([])


def test_a_process_ends_itself_with_one_line_when_a_peer_is_lost(tmp_path):
    code = (
        "import pathlib, sys, threading, time\n"
        "from ccu_jax.distributed import peers\n"
        "watch = peers.Watch(pathlib.Path(sys.argv[1]), 0, 2, timeout_s=1.0)\n"
        "peers._BEAT_S = 0.1\n"
        "threading.Thread(target=watch.run, daemon=True).start()\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert (
        done.returncode == errors.PEER_LOST_EXIT_CODE and time.monotonic() - began < 40
    )
    assert (
        done.stderr.count("\n") == 1 and "error: process 1 of this run" in done.stderr
    )
