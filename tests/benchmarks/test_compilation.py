"""The benchmark of starts tells what it promises; a person judges its numbers."""

import json

import pytest

from ccu_jax.benchmarks import __main__ as bench
from ccu_jax.benchmarks import compilation as bench_compile


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON of one configuration's starts."""
    file = tmp_path_factory.mktemp("bench") / "compile.json"
    flags = ["compile", "--configs", "tiny", "--windows", "1", "--json", str(file)]
    assert bench.main(flags) == 0
    return json.loads(file.read_text())


@pytest.mark.table
def test_moments_follow_each_other_and_the_second_start_compiles_less(ran):
    (of,) = ran["measured"]["configs"]
    assert of["config"] == "tiny" and len(of["warm"]) == 1
    for run in (of["cold"], *of["warm"]):
        assert 0 < run["imports_s"] <= run["data_s"] <= run["unlearning_s"]
        assert run["unlearning_s"] < run["first_step_s"] < run["seconds"]
    (target,) = ran["targets"]
    assert target["value"] == of["warm"][0]["first_step_s"]


def test_the_table_has_a_first_and_a_second_start():
    names = ("imports_s", "data_s", "unlearning_s", "compile_s", "first_step_s")
    run = {name: float(place) for place, name in enumerate(names)}
    slow = run | {"first_step_s": 99.0}
    of = {"config": "tiny", "cold": slow, "warm": [run], "sorted": [4.0]}
    (table,) = bench_compile.tables({"configs": [of]})
    printed = bench.drawn(bench.Table(*table))
    assert "99.0" in printed and printed.count("tiny") == 2
    judged = [bench.judge(**t) for t in bench_compile.targets({"configs": [of]})]
    assert [target["reached"] for target in judged] == [True]


@pytest.mark.parametrize(
    "flags, named", [("--configs tinny", "tinny"), ("--windows 0", "--windows")]
)
def test_what_cannot_be_measured_is_refused_in_a_line(flags, named, capsys):
    assert bench.main(["compile", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1
