"""Interrupted runs resume with the same bits; other data are rejected.

Kills, preemptions and damaged files are tested in `tests/faults`.
"""

import json
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

RESULTS = ("checkpoints", "outputs", "stages", "unlearn_sets")


def wait_until(condition, process, timeout_s=120):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.slow
def test_same_seed_gives_the_same_bits(small, finished, tmp_path):
    run_command("--config", small, "--workdir", tmp_path / "again")
    assert_same_bits(finished[0], tmp_path / "again")


@pytest.mark.smoke
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
