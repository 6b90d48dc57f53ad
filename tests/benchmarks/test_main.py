"""Every benchmark runs at the smallest size and rejects wrong flags in one line."""

import dataclasses
import itertools
import json
import math
import types

import pytest

from ccu_jax.benchmarks import __main__ as benchmarks
from ccu_jax.benchmarks import (
    costs,
    harness,
    input_pipeline,
    scaling,
    steps,
    unlearning,
)
from ccu_jax.config.loading import load_config
from ccu_jax.distributed import executors
from ccu_jax.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns `run(line)`, which returns measurements and output of a command."""
    peaks = costs.Peaks(1e12, 1e11, None)
    monkeypatch.setattr(costs, "measure_peaks", lambda dtype: peaks)

    def run(line: str):
        path = tmp_path / "measured.json"
        assert benchmarks.main([*line.split(), "--json", str(path)]) == 0
        record = json.loads(path.read_text())
        assert {"cpu", "cores", "commit", "versions"} <= set(record["machine"])
        return record["measured"], capsys.readouterr().out

    return run


def _assert_valid_summary(summary, windows):
    assert len(summary["windows"]) == windows
    assert 0 < summary["low"] <= summary["median"] <= summary["high"]


@pytest.mark.slow
def test_step_measures_scan_calls_and_executors(run, monkeypatch):
    monkeypatch.setitem(executors.EXECUTORS, "vmap", lambda: executors.vmap(1))
    line = "step --preset tiny --methods original,ccu_plus --windows 2 --no-torch"
    measured, printed = run(f"{line} --executors vmap,pmap")
    rows = [(row["method"], row["variant"]) for row in measured["steps"]]
    variants = (steps.SCAN, steps.CALLS, "pmap")
    assert rows == [*itertools.product(("original", "ccu_plus"), variants)]
    for row in measured["steps"]:
        _assert_valid_summary(row["seconds"], 2)
        assert row["flops"] > 0
        assert row["method"] in printed
    assert "PyTorch: --no-torch" in printed


@pytest.mark.slow
def test_unlearn_measures_stored_and_computed_features(run):
    line = "unlearn --preset tiny --methods original,ccu_plus,ssd --windows 1"
    measured, printed = run(f"{line} --epochs 1")
    features = [(r["method"], r["features"]) for r in measured["runs"]]
    on_features = [("ccu_plus", "computed"), ("ccu_plus", "stored")]
    assert features == [("original", None), *on_features, ("ssd", None)]
    for result in measured["runs"]:
        _assert_valid_summary(result["seconds"], 1)
        assert ("flops" in result) == (result["steps"] > 0)
    assert "ccu_plus" in printed and "roofline" in printed


@pytest.mark.slow
def test_scale_measures_every_sweep_and_store(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "UNLEARN_FRACTIONS", (0.01, 0.3))
    for name in ("RETAIN_SIZES", "NUM_CLASSES", "IMAGE_SCALES", "DEPTHS"):
        monkeypatch.setattr(scaling, name, getattr(scaling, name)[:1])
    line = "scale --preset tiny --stored 1000,3000 --windows 1 --dir"
    measured, printed = run(f"{line} {tmp_path}")
    sweeps = {row["sweep"] for row in measured["sizes"]}
    unlearn_sets = {"unlearn set, same steps", "unlearn set, same epochs"}
    assert sweeps == unlearn_sets | {"retain set", "classes", "image size", "depth"}
    small, large = measured["store"]
    assert (small["rows"], large["rows"]) == (1000, 3000)
    assert large["disk_mib"] > 2 * small["disk_mib"]
    assert all(sweep in printed for sweep in sweeps)
    assert not list(tmp_path.glob("tmp*"))  # the stores are removed


@pytest.mark.slow
def test_compile_separates_cold_and_warm_starts(run):
    measured, printed = run("compile --configs tiny --windows 1")
    empty, filled = measured["starts"]
    assert (empty["cache"], filled["cache"]) == ("empty", "filled")
    for row in (empty, filled):
        assert 0 < row["compile_s"] < row["first_step_s"] < row["total_s"]
    assert "empty" in printed and "filled" in printed


@pytest.mark.slow
def test_data_measures_preparation_and_feed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(input_pipeline, "_WINDOW_ROWS", 64)
    line = "data --rows-mmimdb 40 --rows-fashion200k 0 --windows 2 --posters 3"
    measured, printed = run(f"{line} --no-records --dir {tmp_path}")
    (prepared,) = measured["prepare"]
    assert prepared["first"]["rows"] == prepared["second"]["rows"] == 40
    assert prepared["second"]["seconds"] < prepared["first"]["seconds"]
    variants = {(row["size"], row["variant"], row["batch"]) for row in measured["feed"]}
    for size in (48, 224):
        assert (size, input_pipeline.PILLOW, None) in variants
        assert (size, input_pipeline.MEMORY_MAP, 64) in variants
    for row in measured["feed"]:
        _assert_valid_summary(row["images_per_s"], 2)
    assert "preparing the sample editions" in printed


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "command: missing"),
        ("date", "date"),
        ("data --row 3", "--row"),
        ("data --rows-mmimdb 5", "data.sample_rows=5: too few movies"),
        ("data --rows-mmimdb many", "'many'"),
        ("data --windows 0", "--windows"),
        ("data --json nowhere/file", "nowhere"),
        ("data --dir file", "file"),
        ("step --preset large", "large"),
        ("step --methods original,ccu_minus", "'ccu_minus'; choose from original"),
        ("step --executors pmap,pmap", "repeats"),
        ("unlearn --epochs -1", "--epochs"),
        ("unlearn --epochs one", "'one' is not a positive number"),
        ("scale --stored 10,20", "--stored"),
        ("scale --dir file/folder", "file"),
    ],
)
def test_wrong_flags_are_rejected(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert benchmarks.main(line.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_ends_with_code_130(monkeypatch, capsys):
    def interrupt(flags):
        raise KeyboardInterrupt

    command = unlearning.COMMANDS["compile"]._replace(measure=interrupt)
    monkeypatch.setitem(unlearning.COMMANDS, "compile", command)
    assert benchmarks.main(["compile"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_failed_run_quotes_its_error(monkeypatch, tmp_path):
    failed = types.SimpleNamespace(returncode=2, stderr="error: no such config\n")
    monkeypatch.setattr(unlearning.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match="no such config"):
        unlearning.run_command("tiny", tmp_path, "original")


def test_windows_are_measured_in_turn_without_the_first():
    order = []

    def measure(name):
        order.append(name)
        return len(order)

    calls = {name: lambda name=name: measure(name) for name in "ab"}
    results = harness.measure_interleaved(calls, 2, harness.Progress("test"))
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert results == {"a": [3, 6], "b": [4, 5]}
    a, b = harness.summarize([1, 2, 9]), harness.summarize([1, 1, 3])
    assert a["median"] == 2 and (a["low"], a["high"]) == (1, 9)
    assert harness.median_ratio(a, b) == 2


def test_child_process_returns_results_and_raises_errors(tmp_path):
    settings = dataclasses.replace(load_config("mmimdb").data, dir="none")
    with harness.start_child() as call:
        memory_mib = call("harness.read_memory_mib", "VmRSS")
        assert math.isnan(memory_mib) or memory_mib > 0
        with pytest.raises(UserError, match="none"):
            call("input_pipeline.prepare", settings, tmp_path, "title")
        with pytest.raises(RuntimeError, match="AttributeError"):
            call("harness.missing")
