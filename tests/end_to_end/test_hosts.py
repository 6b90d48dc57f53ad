"""Several processes give the results of one, and end together."""

import signal
import sys

import numpy as np
import pytest

from ccu_jax.distributed import preemption
from ccu_jax.evaluate import feature_store
from tests.end_to_end import launching
from tests.end_to_end.conftest import assert_close_logits, load_by_method, read_events
from tests.end_to_end.launching import communicate, run_command

pytestmark = pytest.mark.slow
# Few steps: on a busy machine two processes wait for each other at every array.
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
TWO_METHODS = ("original", "ccu_plus")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "hosts.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """The working folder of one process with one device."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    run_command("--config", config, "--workdir", workdir)
    return workdir


def run_local(processes, devices, *argv, code=0):
    """Runs processes with `launch/local.sh`; returns their stdout and stderr."""
    argv = ("bash", launching.ROOT / "launch/local.sh", processes, devices, *argv)
    process = launching.start_process(*argv, VIRTUAL_ENV=sys.prefix)
    out, err = communicate(process)
    assert process.returncode == code, err[-3000:]
    assert "Traceback" not in err and "Warning" not in err
    return out, err


def start_pair(code, *argv):
    """Starts two processes that run Python code, without `launch/local.sh`."""
    argv = (*argv, "--devices", "1", "--multihost", launching.find_free_address(), "2")
    argv = (sys.executable, "-c", code, *argv)
    return [launching.start_process(*argv, index) for index in range(2)]


def assert_both_are_preempted(pair):
    for process in pair:
        _, err = communicate(process, 60)
        assert process.returncode == 75, err
        assert err.strip() == preemption.MESSAGE


def assert_same_results(single, workdir, num_devices, methods=METHODS):
    """Compares results of two processes with those of one up to rounding."""
    name = "unlearn_sets/0.txt"
    assert (workdir / name).read_bytes() == (single / name).read_bytes()
    assert_close_logits(single, workdir, methods)
    features = "checkpoints/original-0/features"
    one, two = (feature_store.read(x / features, {}) for x in (single, workdir))
    assert one.columns.keys() == two.columns.keys() and two.valid.all()
    for name, column in one.columns.items():
        np.testing.assert_allclose(two.columns[name], column, rtol=0, atol=1e-4)
    expected, results = (load_by_method(x / "results.json") for x in (single, workdir))
    assert set(results) == set(methods)
    for method, result in results.items():
        for key in ("unlearn_set", "text_unchanged"):
            assert result[key] == expected[method][key]
        device = result["device"]
        assert (device["count"], device["processes"]) == (num_devices, 2)


@pytest.mark.smoke
def test_two_processes_give_the_results_of_one(config, single, tmp_path):
    workdir = tmp_path / "run"
    argv = ["--config", config, "--workdir", workdir]
    # Each process reads only the images that its devices need.
    argv += ["--set", "run.executor=shard_map", "--set", "run.image_placement=host"]
    out, _ = run_local(2, 2, *argv)
    assert_same_results(single, workdir, 4)
    assert out.count("# hosts (clipart)") == 1, "process 0 alone prints the table"
    assert len(read_events(workdir, "plan")) == 1, "process 0 alone writes events"


SLOW_STEPS = """
import pathlib, sys, time
from ccu_jax import launch
from ccu_jax.train import loop

inputs = loop.send_batches

def slow(program, executor, start, size):
    if program.steps > 2 and start == 2:
        pathlib.Path(sys.argv[2], "steps").touch()
        time.sleep(1)
    time.sleep(0.5)
    return inputs(program, executor, start, size)

loop.send_batches = slow
sys.argv[1:] += ["--set", "run.checkpoint_steps=1000"]
launch.run_process()
"""


def test_preempted_processes_save_the_same_step_and_resume(config, single, tmp_path):
    workdir = tmp_path / "run"
    methods = ("--methods", ",".join(TWO_METHODS))
    argv = ("--workdir", workdir, "--config", config, *methods)
    pair = start_pair(SLOW_STEPS, *argv)
    launching.wait_until((workdir / "steps").exists, *pair)
    pair[1].send_signal(signal.SIGTERM)
    assert_both_are_preempted(pair)
    (saved,) = workdir.glob("checkpoints/original-0/steps*/[0-9]*")
    assert int(saved.name) > 2
    run_local(2, 1, *argv)
    assert_same_results(single, workdir, 2, TWO_METHODS)


SLOW_PREPARATION = """
import pathlib, sys, time
from ccu_jax import data, launch
from ccu_jax.distributed import hosts

hosts._SYNC_EVERY_S = 0.1

def load(config, workdir, progress, fingerprint):
    pathlib.Path(workdir, "loading").touch()
    for _ in range(3000):
        time.sleep(0.1)
        progress("decoding", 0, 1)

data.load = load
launch.run_process()
"""


@pytest.mark.parametrize("terminated", [0, 1])
def test_processes_are_preempted_while_data_are_prepared(config, tmp_path, terminated):
    pair = start_pair(SLOW_PREPARATION, "--workdir", tmp_path, "--config", config)
    launching.wait_until((tmp_path / "loading").exists, *pair)
    pair[terminated].send_signal(signal.SIGTERM)
    assert_both_are_preempted(pair)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--unlearn", "class:nobody"], "class:nobody: no such class"),
        (["--data-dir", "/absent"], "/absent"),  # found by process 0 alone
    ],
)
def test_user_error_ends_all_processes_with_one_line(config, tmp_path, flags, message):
    workdir = tmp_path / "run"
    argv = ("--config", config, "--workdir", workdir, *flags)
    _, err = run_local(2, 1, *argv, code=2)
    # The last lines of other processes follow.
    first = err.partition("last lines of process 1")[0]
    assert first.count("error: ") == 1 and message in first
    assert not (workdir / "config.json").exists()


def test_processes_without_a_shared_folder_report_it(config, tmp_path):
    code = "from ccu_jax import launch; launch.run_process()"
    code = "import sys; sys.argv[2] += sys.argv[-1]; " + code  # --workdir
    pair = start_pair(code, "--workdir", tmp_path / "run", "--config", config)
    for index, process in enumerate(pair):
        _, err = communicate(process, 100)
        assert process.returncode == 2, err
        assert f"{tmp_path / 'run'}{index}: not shared by all processes" in err
        assert "Traceback" not in err
        assert not list((tmp_path / f"run{index}").iterdir())


def test_two_processes_measure_the_audit_of_one(config, tmp_path):
    argv = ["--config", config, "--methods", ",".join(TWO_METHODS)]
    argv += ["--audit", "rigorous", "--shadows", "6"]
    audits = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        run_local(processes, 1, *argv, "--workdir", workdir)
        audits.append(load_by_method(workdir / "audit.json"))
    assert list(audits[0]) == list(audits[1])
    for one, two in zip(*(audit.values() for audit in audits), strict=True):
        assert one["verdict"]["word"] == two["verdict"]["word"]
        (one,), (two,) = one["seeds"], two["seeds"]
        assert set(one) == set(two)
        pools = [seed["pool"]["image"] for seed in (one, two)]
        np.testing.assert_allclose(*(x["lira"]["auc"] for x in pools), atol=0.02)
        cka = [seed["cka"]["original"]["image"][0] for seed in (one, two)]
        np.testing.assert_allclose(*cka, atol=1e-3)
