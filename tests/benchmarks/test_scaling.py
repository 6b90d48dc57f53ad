"""The benchmark of growing costs tells what it promises; a person judges it."""

import contextlib
import io
import json

import numpy as np
import pytest

from ccu_jax.benchmarks import __main__ as bench
from ccu_jax.benchmarks import harness as bench_scale_child
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import scale_devices as bench_scale_devices
from ccu_jax.benchmarks import scale_problem as bench_scale_problem
from ccu_jax.benchmarks import scale_sizes as bench_scale_sizes
from ccu_jax.benchmarks import scale_store as bench_scale_store
from ccu_jax.benchmarks import scaling as bench_scale
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features

TINY = bench_problem.PRESETS["tiny"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON and the printed text of the smallest measurement of everything."""
    folder = tmp_path_factory.mktemp("bench")
    flags = "scale --preset tiny --methods ccu --devices 1,2 --processes 1,2"
    flags += f" --stored 1000,3000 --windows 1 --dir {folder}"
    flags += f" --json {folder / 'scale.json'}"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as fewer, contextlib.redirect_stdout(printed):
        # What is left of a sweep shows what it tells: each point is compiled.
        fewer.setattr(bench_scale_sizes, "SHARES", (0.01, 0.3))
        fewer.setattr(bench_scale_sizes, "RETAINED", (1000,))
        fewer.setattr(bench_scale_sizes, "NUM_CLASSES", (2,))
        fewer.setattr(bench_scale_sizes, "IMAGE_FACTORS", (1.0,))
        fewer.setattr(bench_scale_sizes, "DEPTHS", (2,))
        assert bench.main(flags.split()) == 0
    assert [path.name for path in folder.iterdir()] == ["scale.json"]
    return json.loads((folder / "scale.json").read_text()), printed.getvalue()


@pytest.mark.slow
def test_devices_and_processes_are_compared_with_one_that_does_the_same(ran):
    cases = ran[0]["measured"]["devices"]["cases"]
    found = {(of["devices"], of["processes"]) for of in cases}
    assert found == {(1, 1), (2, 1), (2, 2)}
    assert {of["method"] for of in cases} == {"ccu"}
    for of in cases:
        assert of["ms"]["low"] > 0 and of["to_one"]["median"] > 0
        alone = of["devices"] == 1
        assert not alone or of["to_one"]["median"] == 1
        # Alone there is nobody to talk to; several must be seen to do it.
        shares = of["collectives"]
        assert shares is None if alone else 0 < shares < 1


@pytest.mark.slow
def test_every_sweep_has_its_points_and_computing_features_costs_a_start(ran):
    points = ran[0]["measured"]["sizes"]
    of = {}
    for point in points:
        assert 0 < point["seconds"]["low"] <= point["seconds"]["high"]
        of.setdefault(point["sweep"], []).append(point)
    assert set(of) == {
        getattr(bench_scale_sizes, name)
        for name in ("UNLEARN", "PASSES", "RETAIN", "CLASSES", "IMAGE", "DEPTH")
    }
    rows = [point["value"] for point in of[bench_scale_sizes.UNLEARN]]
    assert rows == [100, 3000]
    few, many = (point["steps"] for point in of[bench_scale_sizes.PASSES])
    assert many == pytest.approx(30 * few, abs=15)  # of few steps one may be half
    stored, computed = of[bench_scale_sizes.DEPTH]
    assert stored["start"]["low"] < computed["start"]["low"]


@pytest.mark.slow
def test_the_same_request_is_made_beside_every_store(ran):
    told = ran[0]["measured"]["store"]
    assert [of["rows"] for of in told["sizes"]] == [1000, 3000]
    small, large = told["sizes"]
    assert large["disk_mib"] == pytest.approx(3 * small["disk_mib"])
    assert small["to_first"]["median"] == 1
    assert small["memory_mib"]["own"] > 0 and small["memory_mib"]["mapped"] > 0
    assert abs(small["memory_mib"]["more"]) < 100  # nothing is added there


@pytest.mark.slow
def test_the_tables_and_the_targets_are_printed(ran):
    told, printed = ran
    for text in ("simulated devices", "same passes", "beside a growing store"):
        assert text in printed
    assert [target["reached"] is None for target in told["targets"]] == [False] * 3


def test_a_line_is_found_and_what_is_none_is_noticed():
    rows = np.array([100, 300, 1000, 2000, 3000])
    straight = bench_scale_sizes.line(rows, 0.01 + 2e-5 * rows)
    assert straight["row_s"] == pytest.approx(2e-5)
    assert straight["fixed_s"] == pytest.approx(0.01)
    assert straight["r2"] == pytest.approx(1) and straight["apart"] < 1e-9
    squared = bench_scale_sizes.line(rows, 0.01 + 2e-8 * rows**2)
    points = [
        {
            "sweep": bench_scale_sizes.PASSES,
            "value": int(value),
            "seconds": {"median": 0.01 + 2e-8 * value**2},
        }
        for value in rows
    ]
    told = {"preset": "tiny", "devices": None, "sizes": points, "store": None}
    judged = [bench.judge(**target) for target in bench_scale.targets(told)]
    assert judged[0]["value"] == squared["apart"]
    assert [target["reached"] for target in judged] == [False, None, None]


def test_devices_are_shared_evenly_by_processes():
    found = bench_scale_devices.cases((1, 2, 4), (1, 2))
    assert [tuple(case) for case in found] == [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]


def test_windows_are_taken_in_turn_and_the_first_round_is_left_out():
    seen = []

    def call(name):
        seen.append(name)
        return len(seen)

    calls = [lambda: call("a"), lambda: call("b")]
    found = bench_scale_child.in_turn(calls, 2, lambda *told: None)
    assert seen == ["b", "a", "a", "b", "b", "a"]
    assert found == [[3, 6], [4, 5]]
    assert bench_scale_child.spread([3, 1, 2])["median"] == 2


def test_a_random_store_is_one_that_unlearning_reads(tmp_path):
    sizes = TINY._replace(rows=50)
    columns = bench_scale_problem.random_columns(sizes, np.random.default_rng(0))
    facts = {"checkpoint": "random", "fingerprint": "bench"}
    features.write(tmp_path / "store", facts, 50, columns, lambda done, total: None)
    store = features.read(tmp_path / "store", facts)
    taken = store.take(np.array([0, 49]))
    norms = np.linalg.norm(taken["z_text"], axis=1)
    assert np.allclose(norms, 1, atol=1e-5)
    wrote = sum(p.stat().st_size for p in (tmp_path / "store").glob("*.bin"))
    each = bench_scale_problem.row_bytes(sizes)
    assert wrote == pytest.approx(50 * each, rel=0.05)


def test_sets_of_a_large_problem_do_not_meet():
    sets = bench_scale_problem.sets_of(TINY._replace(rows=5000), 100, 150)
    assert len(sets.unlearn) == 100 and len(sets.validation) == 150
    assert sorted(np.concatenate(sets)) == list(range(5000))


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path):
    spec = {"preset": "tiny", "small": [1000, "nowhere"], "large": [1000, "nowhere"]}
    child = bench_scale_child.Child(
        "the one", "ccu_jax.benchmarks.scale_store", spec, tmp_path
    )
    with pytest.raises(UserError, match="the one: the process .* ended: .*nowhere"):
        child.answer()
    child.close()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--only devices,shapes", "shapes"),
        ("--windows 0", "--windows"),
        ("--methods ccu,ccu_minus", "ccu_minus"),
        ("--devices 2,4", "--devices"),
        ("--processes 2", "--processes"),
        ("--stored 10,1000", "--stored"),
        ("--stored 1000", "--stored"),
        ("--devices 1,3", "--devices: 3"),
        ("--devices 1,32", "--devices: 32"),
        ("--processes 1,16", "--processes"),
        ("--preset vit_b16", "--only devices,store"),
        ("--stored many", "--stored"),
        ("--executor vmap", "--executor"),
        ("--only store --stored 1000,100000000000", "MiB free"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    flags, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["scale", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("in the way")
    flags = f"scale --only store --dir {taken / 'stores'}"
    assert bench.main(flags.split()) == 2
    assert "--dir" in capsys.readouterr().err


def test_there_is_a_least_number_of_stored_rows_that_fits_the_sets():
    sizes = TINY._replace(rows=bench_scale_store.LEAST)
    sets = bench_scale_problem.sets_of(
        sizes, bench_scale_store.UNLEARN, bench_scale_store.HELD
    )
    assert len(sets.retain) >= bench_scale_store.RETAIN
