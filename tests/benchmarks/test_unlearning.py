"""The account of what unlearning costs tells what it promises to tell."""

import argparse
import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.benchmarks import __main__ as bench
from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import unlearning as bench_unlearn
from ccu_jax.distributed import executors as parallel
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS

METHODS_RUN = "original,ssd,ccu_plus"
# What is told does not hang on the devices, and one has the least to compile for.
ON_ONE = ("vmap", lambda: parallel.vmap(1))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON and the printed text of the smallest measurement."""
    file = tmp_path_factory.mktemp("bench") / "unlearn.json"
    printed = io.StringIO()
    flags = f"unlearn --preset tiny --methods {METHODS_RUN} --windows 2 --epochs 1"
    flags += " --executor vmap"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(parallel.EXECUTORS, *ON_ONE)
        assert bench.main([*flags.split(), "--json", str(file)]) == 0
    return json.loads(file.read_text()), printed.getvalue()


def test_every_method_is_accounted_for_with_features_computed_and_stored(ran):
    runs = ran[0]["measured"]["runs"]
    kinds = [(run["method"], run["features"]) for run in runs]
    plus = [("ccu_plus", "computed"), ("ccu_plus", "stored")]
    assert kinds == [("original", None), ("ssd", None), *plus]
    for run in runs:
        seconds = run["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert run["compile_s"] > 0 and run["trained"] > 0
        step = run["per_step"]
        if run["method"] == "ssd":  # which makes none
            assert run["steps"] == 0 and set(step.values()) == {None}
            continue
        assert run["steps"] > 0
        assert min(step["ms"], step["flops"], step["bytes"], step["memory"]) > 0
        assert run["mfu"] > 0 and run["roofline"] > 0
    original, closed, computed, stored = runs
    assert stored["per_step"]["flops"] == computed["per_step"]["flops"]
    assert original["trained"] == closed["trained"] > stored["trained"]


def test_the_table_names_what_was_measured_and_what_was_not(ran):
    printed = ran[1]
    for text in ("tiny: retain", "ccu_plus, features stored", "GFLOP", "ssd"):
        assert text in printed
    assert printed.count("not measured") == 2  # the targets of a GPU


def test_all_steps_of_a_method_that_would_stop_are_measured():
    problem = bench_problem.make(bench_problem.PRESETS["tiny"], "vmap")
    stopping = METHODS["gradient_ascent_stop"](problem)
    assert stopping.stop is not None
    program = bench_problem.stepping("gradient_ascent_stop", problem)
    assert program.stop is None and program.refresh is not None
    # Its parts are what it looks at, not what it learns from.
    assert program.sharded_tables and not program.is_fully_sharded
    with pytest.raises(UserError, match="--methods: ssd makes no steps"):
        bench_problem.stepping("ssd", problem)


def test_the_batches_of_every_method_can_be_changed():
    config = bench_problem.settings(bench_problem.PRESETS["tiny"])
    changed = bench_problem.with_batches(config, lambda field, old: 3 * old)
    for name in METHODS:
        section = name if hasattr(config, name) else "train"
        old, new = (vars(getattr(of, section)) for of in (config, changed))
        assert old.keys() == new.keys()
        for key, x in old.items():
            assert new[key] == (3 * x if key.endswith("batch") else x), (name, key)


@pytest.mark.slow
def test_a_refresh_falls_on_the_steps_that_it_serves(monkeypatch):
    monkeypatch.setitem(parallel.EXECUTORS, *ON_ONE)
    problem = bench_problem.make(bench_problem.PRESETS["tiny"], "vmap")
    problem = problem._replace(method="ccu_plus")
    program = METHODS["ccu_plus"](problem)
    key, of = problem.key("steps"), bench_cost.of_step
    bare = of(program._replace(refresh=None), problem.executor, key)
    every = of(program._replace(refresh_every=1), problem.executor, key)
    eighth = of(program._replace(refresh_every=8), problem.executor, key)
    assert bare["flops"] < eighth["flops"] < every["flops"]
    dear = every["flops"] - bare["flops"]
    assert eighth["flops"] - bare["flops"] == pytest.approx(dear / 8, rel=1e-3)


def test_flops_of_a_product_are_those_of_the_textbook():
    a, b = jnp.ones((32, 48)), jnp.ones((48, 16))
    found = bench_cost.counted(jax.jit(jnp.matmul).lower(a, b).compile())
    assert found["flops"] == pytest.approx(2 * 32 * 48 * 16, rel=0.05)


def test_the_use_of_a_device_is_judged_by_its_peaks():
    peak = {"flops": 100.0, "bytes": 10.0, "datasheet": None}
    dense = {"flops": 400.0, "bytes": 4.0}
    assert bench_cost.judged(dense, 8.0, peak) == {"mfu": 0.5, "roofline": 0.5}
    # Two operations for each byte: no more than 20 a second are to be had.
    sparse = {"flops": 40.0, "bytes": 20.0}
    assert bench_cost.judged(sparse, 4.0, peak) == {"mfu": 0.1, "roofline": 0.5}
    advertised = {**peak, "datasheet": 200.0}
    assert bench_cost.judged(dense, 8.0, advertised)["mfu"] == 0.25
    unknown = {"flops": None, "bytes": None}
    assert bench_cost.judged(unknown, 1.0, peak) == {"mfu": None, "roofline": None}


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--methods ccu_minus", "ccu_minus"),
        ("--windows 0", "--windows"),
        ("--epochs 0", "--epochs"),
        ("--epochs inf", "--epochs"),
        ("--preset large", "--preset"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(flags, named, capsys):
    assert bench.main(["unlearn", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1


def test_the_rows_of_a_problem_are_cut_into_sets_that_do_not_meet():
    sizes = bench_problem.PRESETS["tiny"]
    sets = bench_problem.sets(
        bench_problem.settings(sizes), sizes, np.random.default_rng(0)
    )
    rows = np.concatenate(sets)
    assert sorted(rows) == list(range(sizes.rows))
    trained = len(sets.retain) + len(sets.unlearn)
    assert len(sets.unlearn) == pytest.approx(sizes.share * trained, abs=2)


def test_targets_of_a_gpu_are_judged_on_a_gpu():
    runs = [
        {"method": "ccu_plus", "features": kind, "seconds": {"median": 2.0}}
        for kind in ("computed", "stored")
    ]
    told = {"preset": "vit_b16", "peak": {"kind": "H200"}, "runs": runs}
    judged = [bench.judge(**target) for target in bench_unlearn.targets(told)]
    assert [target["reached"] for target in judged] == [True, False]
    told["peak"] = {"kind": "A100"}
    judged = [bench.judge(**target) for target in bench_unlearn.targets(told)]
    assert [target["reached"] for target in judged] == [None, None]


def test_the_rows_of_a_large_problem_are_those_of_mm_imdb():
    sizes = bench_problem.PRESETS["vit_b16"]
    rng = np.random.default_rng(0)
    sets = bench_problem.sets(bench_problem.settings(sizes), sizes, rng)
    trained = len(sets.retain) + len(sets.unlearn)
    assert trained == pytest.approx(15_552, abs=5)


def test_no_run_goes_on_from_what_another_has_left(monkeypatch):
    tiny = bench_problem.settings

    def often(sizes):
        config = tiny(sizes)
        run = dataclasses.replace(config.run, checkpoint_steps=1, steps_per_call=1)
        return dataclasses.replace(config, run=run)

    monkeypatch.setattr(bench_problem, "settings", often)
    monkeypatch.setitem(parallel.EXECUTORS, *ON_ONE)
    flags = "--preset tiny --methods original,finetune --windows 1 --executor vmap"
    parser = argparse.ArgumentParser()
    bench_unlearn.flags(parser)
    told = bench_unlearn.measure(parser.parse_args([*flags.split(), "--epochs", "3"]))
    runs = {run["method"]: run for run in told["runs"]}
    for run in runs.values():
        assert run["steps"] > 1 and set(run["windows"]) == {run["steps"]}
    assert runs["finetune"]["steps"] != runs["original"]["steps"]
