"""The benchmark tells what it promises to tell; its numbers are judged by a person."""

import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from ccu_jax import data
from ccu_jax.benchmarks import __main__ as bench
from ccu_jax.benchmarks import feed as bench_feed
from ccu_jax.benchmarks import input_pipeline as bench_data
from ccu_jax.benchmarks import prepare as bench_prepare
from ccu_jax.data.preparation import tfds_builders as records
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

ROWS = 40


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON and the printed text of a benchmark with tiny numbers."""
    folder = tmp_path_factory.mktemp("bench")
    flags = f"data --rows-mmimdb {ROWS} --rows-fashion 0 --windows 2 --posters 3"
    flags += " --no-records"
    flags = [*flags.split(), "--dir", str(folder)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench_feed, "_WINDOW_S", 0.005)
        patch.setattr(records, "import_tensorflow", _no_tensorflow)
        assert bench.main([*flags, "--json", str(folder / "json")]) == 0
    return json.loads((folder / "json").read_text()), printed.getvalue()


def _no_tensorflow():
    raise UserError("keeping TFDS records needs TensorFlow and TFDS: pip install it")


def test_what_is_measured_at_full_size_can_be_written_and_read():
    assert bench_data.FULL == {"mmimdb": 25_959, "fashion200k": 201_838}
    for name in bench_data.FULL:
        assert name in data.DATASETS and name in editions.WRITERS


def test_all_that_was_measured_is_in_the_json(ran):
    told, _ = ran
    assert set(told) == {"benchmark", "machine", "measured", "targets"}
    assert told["benchmark"] == "data"
    machine = told["machine"]
    assert machine["cores"] and machine["cpu"] and machine["versions"]["jax"]
    assert {"commit", "usable_cores", "memory_mib", "device"} <= set(machine)
    measured = told["measured"]
    assert measured["settings"]["mmimdb"] == ROWS
    assert [of["dataset"] for of in measured["prepare"]] == ["mmimdb"]
    for of in measured["prepare"]:
        assert of["sample_s"] > 0
        for start in ("first", "second", "killed", "resumed"):
            assert {"seconds", "stages_s", "decodes", "growth_mib"} <= set(of[start])
    assert [of["size"] for of in measured["feed"]] == [48, 224]
    for of in measured["feed"]:
        ways = [(way["way"], way["batch"]) for way in of["ways"]]
        assert ways[0] == (bench_feed.PILLOW, None)
        names = ("feed", "numpy take", "gather on device", "send from host")
        assert ways[1:] == [(name, batch) for batch in (64, 256) for name in names]
        for way in of["ways"]:
            assert len(way["windows"]) == 2
            assert 0 < way["low"] <= way["median"] <= way["high"]
            assert way["to_decode"] > 0
        assert of["notes"]  # that TensorFlow is not there


def test_a_start_tells_its_stages_and_what_it_decoded(ran):
    for of in ran[0]["measured"]["prepare"]:
        first, second = of["first"], of["second"]
        assert first["rows"] == of["rows"] == first["pictures"] == first["decodes"]
        assert second["decodes"] == 0 and second["rows"] == of["rows"]
        assert set(bench_prepare.STAGES) <= set(first["stages_s"])
        total = sum(first["stages_s"].values())
        assert total == pytest.approx(first["seconds"], rel=0.01)
        if sys.platform == "linux":
            assert first["growth_mib"] > 0
            assert first["peak_mib"] > first["early_mib"] > 10


def test_a_killed_start_is_gone_on_with(ran):
    for of in ran[0]["measured"]["prepare"]:
        killed, resumed = of["killed"], of["resumed"]
        assert "fingerprint" not in killed  # it came to no end
        assert killed["last_row"] == of["rows"] // 2
        assert resumed["first_row"] == 1  # so few rows are a part of their own
        assert resumed["fingerprint"] == of["first"]["fingerprint"]


def test_the_table_says_what_was_measured_and_where(ran):
    told, printed = ran
    machine = told["machine"]
    for text in (machine["cpu"], machine["commit"], machine["versions"]["numpy"]):
        assert text is None or text in printed
    for text in ("rows a second", "growth between", "feed", "numpy take", "targets"):
        assert text in printed
    assert "decode, tf.data: keeping TFDS records needs TensorFlow" in printed
    assert printed.count("target ") == len(told["targets"]) == 5 + 2 * 2 * 2


def test_numbers_that_miss_a_target_are_told_and_are_no_error(
    ran, capsys, monkeypatch, tmp_path
):
    measured = copy.deepcopy(ran[0]["measured"])
    good = _judged(measured)
    for of in measured["prepare"]:
        of["first"] |= {"growth_mib": 300.5, "decodes": of["rows"] + 1}
        of["second"]["decodes"] = 1
        of["killed"]["last_row"] = 4097  # and the next start begins at 1
        of["resumed"]["fingerprint"] = "another"
    for of in measured["feed"]:
        for way in of["ways"]:
            if way["way"] == bench_feed.FEED:
                way |= {"to_decode": 9.9, "to_take": 0.79}
    bad = _judged(measured)
    assert bad.keys() == good.keys() and not any(bad.values())
    for name, reached in good.items():
        if "feed to" not in name:  # as fast as promised on any machine is too much
            assert reached, name
    monkeypatch.setattr(bench_data, "measure", lambda flags: measured)
    assert bench.main(["data", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == len(bad) and "reached" not in printed


def _judged(measured):
    judged = [bench.judge(**target) for target in bench_data.targets(measured)]
    return {target["name"]: target["reached"] for target in judged}


def test_a_target_is_reached_at_its_bound():
    assert bench.judge("growth", 300, "<=", 300)["reached"]
    assert bench.judge("speed", 10.0, ">=", 10)["reached"]
    assert not bench.judge("decodings", 1.001, "==", 1)["reached"]
    assert bench.judge("unknown", None, "<=", 1)["reached"] is None


@pytest.mark.parametrize(
    "first, last, again", [(4097, 5000, 904), (5001, 5000, 0), (None, 5000, 0)]
)
def test_rows_done_again_are_those_between_the_starts(first, last, again):
    killed, resumed = {"last_row": last}, {"first_row": first}
    assert bench_data.done_again(killed, resumed) == again


def test_where_memory_is_not_told_its_place_is_left_empty(ran):
    measured = copy.deepcopy(ran[0]["measured"])
    for of in measured["prepare"]:
        of["first"] |= {"early_mib": None, "peak_mib": None, "growth_mib": None}
    (title, header, lines, notes), *_ = bench_data.tables(measured)
    growth = next(line for line in lines if "growth" in line[0])
    assert growth[1:] == [""]
    assert "/proc" in " ".join(notes)
    growths = [r for name, r in _judged(measured).items() if "growth" in name]
    assert growths == [None]


@pytest.mark.parametrize(
    "flags, word",
    [
        ("", "command"),
        ("date", "date"),
        ("data --row 3", "--row"),
        ("data --rows-mmimdb 5", "--rows-mmimdb: 5 is below 30"),
        ("data --rows-mmimdb -5", "--rows-mmimdb"),
        ("data --rows-mmimdb many", "'many'"),
        ("data --rows-mmimdb 0", "--only prepare"),
        ("data --rows-fashion 3", "--rows-fashion: 3 is below"),
        ("data --windows 0", "--windows"),
        ("data --posters 0", "--posters"),
        ("data --only train", "'train'"),
        ("data --json nowhere/file", "nowhere"),
        ("data --json .", "--json"),
        ("data --dir file", "--dir"),
        ("_prepare", "_prepare"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    flags, word, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench_data, "measure", lambda flags: pytest.fail("measured"))
    assert bench.main(flags.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert word in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_data_that_cannot_be_prepared_end_the_benchmark_in_one_line(
    capfd, tmp_path, monkeypatch
):
    def broken(dataset, rows, folder):
        (folder / "sample").mkdir(parents=True)
        return folder / "sample", None

    monkeypatch.setattr(bench_prepare, "write_sample", broken)
    flags = "data --only prepare --rows-mmimdb 30 --rows-fashion 0".split()
    assert bench.main([*flags, "--dir", str(tmp_path)]) == 2
    reason, told = capfd.readouterr().err.splitlines()
    assert "split.json" in reason and told.startswith("error: preparing mmimdb failed")


@pytest.mark.skipif(os.name == "nt", reason="no process groups to interrupt")
def test_ctrl_c_ends_it_and_what_it_has_started_with_code_130(tmp_path):
    flags = "data --only prepare --rows-mmimdb 3000 --rows-fashion 0".split()
    command = [
        sys.executable,
        "-m",
        "ccu_jax.benchmarks",
        *flags,
        "--dir",
        str(tmp_path),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as started:
        for line in started.stderr:
            if "writing the sample edition" in line:
                break
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does
        _, told = started.communicate(timeout=30)
    assert started.returncode == 130
    assert "stopped" in told and "Traceback" not in told
