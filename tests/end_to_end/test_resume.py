"""Interrupted runs resume and end with the same bits; damage is named."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from ccu_jax.storage.records import add_line_checksum
from tests.end_to_end.conftest import assert_same_bits, events, read_files
from tests.end_to_end.launching import (
    ROOT,
    fail_command,
    run_command,
    start_command,
)

NUM_KILLS = 8
RESULTS = ("checkpoints", "outputs", "stages", "unlearn_sets")


def wait_until(condition, process, timeout_s=120):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.slow
def test_same_seed_gives_the_same_bits(finished, again):
    assert_same_bits(finished[0], again[0])


@pytest.mark.slow
def test_run_killed_between_checkpoint_and_result_ends_with_the_same_bits(
    small, finished, copy
):
    (copy / "stages" / "ccu_plus-0.json").unlink()
    run_command("--config", small, "--workdir", copy)
    assert_same_bits(finished[0], copy)


@pytest.mark.slow
def test_interrupt_is_one_line_and_exit_code_130(small, finished, copy):
    for folder in ("stages", "checkpoints", "outputs"):
        shutil.rmtree(copy / folder)
    num_old = len(events(copy, "stage_start"))
    process = start_command("--config", small, "--workdir", copy)
    wait_until(lambda: len(events(copy, "stage_start")) > num_old + 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") == 1, err
    assert "seed 0: original ..." in out and "done, 12/12" not in out
    run_command("--config", small, "--workdir", copy, "--methods", "original")
    assert_same_bits(finished[0], copy, ["original"])


@pytest.mark.slow
def test_preempted_run_saves_its_steps_and_resumes(small, finished, tmp_path):
    workdir = tmp_path / "run"
    # No checkpoint but the one that the signal causes.
    argv = ("--config", small, "--workdir", workdir)
    argv = (*argv, "--set", "run.checkpoint_steps=1000")
    process = start_command(*argv)
    path = workdir / "events.jsonl"
    started = '"kind": "stage_start", "title": "seed 0: original"'
    wait_until(lambda: path.exists() and started in path.read_text(), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "same command" in err, err
    assert "Traceback" not in err
    run_command(*argv)
    assert_same_bits(finished[0], workdir)


@pytest.mark.slow
def test_run_killed_at_any_moment_ends_with_the_same_bits(small, again, tmp_path):
    undisturbed, seconds = again
    rng = random.Random(0)
    num_kills, num_within_method = 0, 0
    while num_kills < NUM_KILLS:
        workdir, is_finished = tmp_path / f"after-{num_kills}", False
        argv = ["--config", small, "--workdir", workdir, "--methods", "ccu_plus"]
        while not is_finished:
            process = start_command(*argv)
            if num_kills < NUM_KILLS:
                # The first tenth only imports; two of three methods are run.
                delay_s = rng.uniform(0.1, 0.7) * seconds
                at_checkpoint = num_kills % 2 == 1
                _sleep(delay_s, process, workdir, at_checkpoint, rng)
                process.kill()
            _, err = process.communicate(timeout=400)
            is_finished = process.returncode != -signal.SIGKILL
            assert not is_finished or (process.returncode, err) == (0, ""), err
            num_kills += not is_finished
            num_within_method += not is_finished and bool(_steps(workdir))
        assert_same_bits(undisturbed, workdir, ["original", "ccu_plus"])
    assert num_within_method, "no kill fell between two checkpoints of a method"


def _steps(workdir):
    """Returns the checkpoints of unfinished methods."""
    return set(workdir.glob("checkpoints/*/steps*/[0-9]*"))


def _sleep(delay_s, process, workdir, at_checkpoint, rng):
    """Waits for some time, or until shortly after a method's next checkpoint."""
    before = _steps(workdir)
    end_s = time.monotonic() + delay_s * (3 if at_checkpoint else 1)
    while process.poll() is None and time.monotonic() < end_s:
        if at_checkpoint and _steps(workdir) - before:
            return time.sleep(rng.uniform(0, 0.3))
        time.sleep(0.01)


@pytest.mark.slow
def test_damaged_checkpoint_is_named_and_its_original_trained_again(
    small, finished, copy
):
    folder = copy / "checkpoints" / "original-0" / "params"
    largest = max(folder.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    largest.write_bytes(bytes(255 - byte for byte in largest.read_bytes()))
    (copy / "stages" / "ccu_plus-0.json").unlink()
    process = start_command("--config", small, "--workdir", copy)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, err
    record = copy / "stages" / "original-0.json"
    # Threads of Orbax may write text of their own, without an end of line.
    messages = re.findall(r"error: .*checkpoint of original.*", err)
    assert len(messages) == 1, err
    assert str(folder) in messages[0] and str(record) in messages[0]
    assert "is unusable" in out
    record.unlink()
    run_command("--config", small, "--workdir", copy)
    assert_same_bits(finished[0], copy)


@pytest.mark.slow
def test_damaged_or_other_unlearn_set_changes_no_result(small, copy):
    path = copy / "unlearn_sets" / "0.txt"
    *lines, _ = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines) + "\n", "utf-8")
    before = read_files(copy, *RESULTS)
    err = fail_command("--config", small, "--workdir", copy)
    assert f"{path}: damaged or edited; remove it" in err
    assert before == read_files(copy, *RESULTS)
    path.write_text(add_line_checksum("\n".join(lines[:-1]) + "\n"), "utf-8")
    err = fail_command("--config", small, "--workdir", copy)
    assert f"{path}: lists another unlearn set" in err and "--workdir" in err


@pytest.mark.slow
def test_changed_data_replace_nothing(small, tmp_path):
    folder, workdir = tmp_path / "own", tmp_path / "run"
    shutil.copytree(ROOT / "ccu_jax/data/clipart", folder)
    argv = ["--config", small, "--workdir", workdir, "--data-dir", folder]
    argv += ["--methods", "original"]
    run_command(*argv)
    before = read_files(workdir, *RESULTS, "data")
    path = folder / "pairs.jsonl"
    first, *others = path.read_text("utf-8").splitlines()
    row = json.loads(first)
    first = json.dumps({**row, "text": "another " + row["text"]})
    path.write_text("\n".join([first, *others]) + "\n", "utf-8")
    err = fail_command(*argv)
    assert "changed" in err and str(folder) in err and "--workdir" in err
    assert before == read_files(workdir, *RESULTS, "data")
