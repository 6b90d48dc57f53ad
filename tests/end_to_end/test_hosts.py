"""Several processes, as on several hosts: real ones, started by `launch/local.sh`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ccu_jax.distributed import preemption
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate import predictions
from tests.end_to_end.launching import ROOT, run_command, run_environment

# Few steps: two processes on a busy machine wait for each other at every array.
CONFIG = """
from ccu_jax.config import CcuPlus, Config, Data, Model, RandomLabel, Run, Scrub, Train

config = Config(
    name="hosts",
    data=Data(dataset="pairs", image_size=8, text_length=6, vocabulary=120),
    model=Model(patch=4, image_width=8, image_depth=1, text_width=8, text_depth=1,
                heads=2, embed_dim=4),
    train=Train(epochs=1, batch=256, shift=1),
    salun_stop=RandomLabel(epochs=0.1, batch=64, saliency_fraction=0.5, stop=True),
    scrub_rewind=Scrub(epochs=1, ascent_epochs=1, batch=512, rewind=True),
    ccu_plus=CcuPlus(steps=2, batch=32, unlearn_batch=16),
    run=Run(steps_per_call=1, checkpoint_steps=1, evaluate_batch=1024),
    methods=("original", "salun_stop", "scrub_rewind", "ccu_plus"),
)
"""
METHODS = ("original", "salun_stop", "scrub_rewind", "ccu_plus")
INTERRUPTED = ("original", "ccu_plus")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "hosts.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The workdir of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run_command("--config", config, "--workdir", workdir)
    return workdir


def _start(processes, devices, *argv):
    return subprocess.Popen(
        ["bash", ROOT / "launch/local.sh", str(processes), str(devices)]
        + [str(arg) for arg in argv],
        env=run_environment(VIRTUAL_ENV=sys.prefix),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(process, seconds=400):
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


def _stored(workdir):
    """The original's features, whatever the checkpoint."""
    found = features.read(workdir / "checkpoints" / "original-0" / "features", {})
    assert found is not None
    return found


def _assert_same(alone, workdir, out, processes, devices, methods=METHODS):
    """What a run of several processes left is what one process left, but rounding."""
    name = "unlearn_sets/0.txt"
    assert (workdir / name).read_bytes() == (alone / name).read_bytes()
    for method in methods:
        one, two = (
            predictions.load_predictions(folder / "outputs" / f"{method}-0.npz")
            for folder in (alone, workdir)
        )
        assert one.id.tolist() == two.id.tolist()
        assert one.split.tolist() == two.split.tolist()
        for view, logits in one.logits.items():
            np.testing.assert_allclose(two.logits[view], logits, rtol=0, atol=1e-4)
    one, two = (_stored(folder) for folder in (alone, workdir))
    assert one.columns.keys() == two.columns.keys() and two.valid.all()
    for name, column in one.columns.items():
        np.testing.assert_allclose(two.columns[name], column, rtol=0, atol=1e-4)
    first, second = (
        {
            row["method"]: row
            for row in json.loads((folder / "results.json").read_text())
        }
        for folder in (alone, workdir)
    )
    assert set(second) == set(methods)
    for method, two in second.items():
        one = first[method]
        assert one["unlearn_set"] == two["unlearn_set"]
        assert one["text_unchanged"] == two["text_unchanged"]
        told = two["device"]
        assert told["count"] == processes * devices
        assert told["processes"] == processes
    assert out.count("# hosts (clipart)") == 1, "process 0 alone shows the table"


@pytest.mark.slow
def test_two_processes_with_two_devices_come_to_what_one_comes_to(
    config, alone, tmp_path
):
    workdir = tmp_path / "run"
    argv = ["--config", config, "--workdir", workdir]
    # Here pictures are read by the process whose devices need them.
    argv += ["--set", "run.executor=shard_map", "--set", "run.image_placement=host"]
    process = _start(2, 2, *argv)
    out, err = _end(process)
    assert process.returncode == 0, err[-3000:]
    assert "Traceback" not in err and "Warning" not in err
    _assert_same(alone, workdir, out, 2, 2)


@pytest.mark.slow
def test_two_processes_can_be_interrupted_and_come_to_what_one_comes_to(
    config, alone, tmp_path
):
    workdir = tmp_path / "run"
    argv = ["--config", config, "--workdir", workdir, "--set", "run.executor=pmap"]
    argv += ["--methods", ",".join(INTERRUPTED)]
    process = _start(2, 1, *argv)
    end = time.monotonic() + 200
    while not list(workdir.glob("checkpoints/*/steps*/[0-9]*")):
        assert process.poll() is None and time.monotonic() < end, _end(process)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = _end(process, 60)
    assert process.returncode == 130, err
    assert "rerun the same command to resume" in err
    assert not (workdir / "results.json").exists()
    process = _start(2, 1, *argv)
    out, err = _end(process)
    assert process.returncode == 0, err[-3000:]
    _assert_same(alone, workdir, out, 2, 1, INTERRUPTED)
    lines = (workdir / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("plan") == 2, "process 0 alone writes events"


SLOW = """
import pathlib, sys, time
from ccu_jax import launch
from ccu_jax.train import step

inputs = step.step_inputs
last = sys.argv.pop(1) == "last"

def slow(program, executor, start, size):
    if program.steps > 2 and start == (program.steps - 1 if last else 2):
        pathlib.Path(sys.argv[2], "steps").touch()
        time.sleep(1)
    time.sleep(0.5)
    return inputs(program, executor, start, size)

step.step_inputs = slow
sys.argv[1:1] = ["--workdir"]
sys.argv[1:] += ["--devices", "1", "--set", "run.checkpoint_steps=1000"]
launch.run_process()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when, told", [("soon", 0), ("last", 1)])
def test_two_processes_save_the_same_step_and_leave_when_one_is_told_to(
    config, alone, tmp_path, when, told
):
    workdir = tmp_path / "run"
    argv = ["--config", config, "--methods", "original,ccu_plus"]
    both = _both(SLOW, when, workdir, *argv)
    end = time.monotonic() + 200
    while not (workdir / "steps").exists():
        assert all(one.poll() is None for one in both) and time.monotonic() < end
        time.sleep(0.02)
    both[told].send_signal(signal.SIGTERM)
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert err.strip() == preemption.MESSAGE
    (saved,) = workdir.glob("checkpoints/original-0/steps*/[0-9]*")
    assert int(saved.name) > 2
    if when == "last":  # one process goes on from there in `test_loop.py`
        return
    process = _start(2, 1, *argv, "--workdir", workdir)
    out, err = _end(process)
    assert process.returncode == 0, err[-3000:]
    _assert_same(alone, workdir, out, 2, 1, INTERRUPTED)


@pytest.mark.slow
def test_wrong_input_ends_all_processes_with_one_line(config, tmp_path):
    workdir = tmp_path / "run"
    argv = ["--config", config, "--workdir", workdir, "--unlearn", "class:nobody"]
    began = time.monotonic()
    process = _start(2, 1, *argv)
    _, err = _end(process, 100)
    assert process.returncode == 2, err
    assert time.monotonic() - began < 60
    # What other processes said is shown below their names.
    mine = err.partition("last lines of process 1")[0]
    assert mine.count("error: ") == 1 and "class:nobody: no such class" in mine
    assert "Traceback" not in err
    assert not (workdir / "config.json").exists()


@pytest.mark.slow
def test_processes_that_share_no_folder_are_told_so(config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(2):
        argv = ["--config", config, "--workdir", tmp_path / str(index)]
        argv += ["--devices", 1, "--multihost", address, 2, index]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "ccu_jax.launch", *map(str, argv)],
                env=run_environment(),
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    for index, process in enumerate(processes):
        _, err = _end(process, 100)
        assert process.returncode == 2, err
        assert f"{tmp_path / str(index)}: not shared by all processes" in err
        assert "Traceback" not in err
        assert not list((tmp_path / str(index)).iterdir())


@pytest.mark.slow
def test_two_processes_audit_what_one_audits(config, tmp_path):
    argv = ["--config", config, "--methods", "original,ccu_plus", "--audit", "rigorous"]
    argv += ["--shadows", "6"]
    found = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        process = _start(processes, 1, *argv, "--workdir", workdir)
        _, err = _end(process)
        assert process.returncode == 0 and "Traceback" not in err, err[-3000:]
        found.append(json.loads((workdir / "audit.json").read_text()))
    for one, two in zip(*found, strict=True):
        assert one["method"] == two["method"]
        assert one["verdict"]["word"] == two["verdict"]["word"]
        (one,), (two,) = one["seeds"], two["seeds"]
        assert set(one) == set(two)
        pools = [seed["pool"]["image"] for seed in (one, two)]
        np.testing.assert_allclose(*(x["lira"]["auc"] for x in pools), atol=0.02)
        kept = [seed["cka"]["original"]["image"][0] for seed in (one, two)]
        np.testing.assert_allclose(*kept, atol=1e-3)


BUSY = """
import importlib, pathlib, sys, time
import jax
from ccu_jax import launch

module, name, workdir = sys.argv[1:4]
module = importlib.import_module(f"ccu_jax.{module}")
before = getattr(module, name)

def busy(*args):
    pathlib.Path(workdir, f"busy-{jax.process_index()}").touch()
    if jax.process_index() == 0:
        time.sleep(500)
    return before(*args)

setattr(module, name, busy)
sys.argv[1:] = [*sys.argv[3:], "--devices", "1"]
sys.argv[1:2] = ["--workdir", workdir]
launch.run_process()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, told",
    [
        ("runs.workdir try_lock", 1),
        ("data load", 1),
        ("evaluate.predictions predict_all_splits", 0),
    ],
)
def test_all_leave_at_once_while_one_is_busy_and_the_other_waits_for_it(
    config, tmp_path, what, told
):
    both = _both(BUSY, *what.split(), tmp_path, "--config", config)
    end = time.monotonic() + 200
    busy = {tmp_path / "busy-0"} | ({tmp_path / "busy-1"} if "eval" in what else set())
    while not all(path.exists() for path in busy):
        assert all(one.poll() is None for one in both) and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)  # the other one waits for it, in C
    began = time.monotonic()
    both[told].send_signal(signal.SIGTERM)
    for process in both:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 75, err
        assert err.strip() == preemption.MESSAGE
    assert time.monotonic() - began < 25


ENDED = """
import pathlib, sys, time
import jax
from ccu_jax import launch

before = launch.main

def main():
    code = before()
    pathlib.Path(sys.argv[2], f"ended-{jax.process_index()}").touch()
    time.sleep(5 * (1 - jax.process_index()))
    return code

launch.main = main
sys.argv[1:] += ["--devices", "1"]
launch.run_process()
"""


@pytest.mark.slow
def test_what_has_ended_well_is_not_told_to_leave_any_more(config, tmp_path):
    argv = ["--config", config, "--methods", "original"]
    both = _both(ENDED, "--workdir", tmp_path, *argv)
    end = time.monotonic() + 200
    while not all((tmp_path / f"ended-{index}").exists() for index in range(2)):
        assert all(one.poll() is None for one in both) and time.monotonic() < end
        time.sleep(0.05)
    both[0].send_signal(signal.SIGTERM)
    for process in both:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


HUNG = """
import sys, time
import jax
from ccu_jax import launch
from ccu_jax.train import step

inputs = step.step_inputs

def hangs(*args):
    if jax.process_index() == 1:
        time.sleep(500)
    return inputs(*args)

step.step_inputs = hangs
sys.argv[1:] += ["--set", "run.hang_timeout_s=12", "--devices", "1"]
launch.run_process()
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_all_and_the_run_ends(config, tmp_path):
    both = _both(HUNG, "--config", config, "--workdir", tmp_path / "run")
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 76, err
        assert err.count("\n") == 1 and "process 1 of this run, for which the" in err


def _both(code, *argv):
    """Two processes that run the code, and nobody looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    argv = [*map(str, argv), "--multihost", address, "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *argv, str(index)],
            env=run_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
