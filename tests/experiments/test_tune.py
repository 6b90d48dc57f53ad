"""Tuning, ablation and the variants that both are made of."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Config, check_values, replace_value
from ccu_jax.distributed import executors as parallel
from ccu_jax.errors import UserError
from ccu_jax.evaluate.feature_store import make_compute_fn
from ccu_jax.evaluate.forward import Forward
from ccu_jax.experiments import ablate, tune, variants
from ccu_jax.experiments.search_spaces import space
from ccu_jax.experiments.variants import Variant
from ccu_jax.methods import METHODS, OURS, REFERENCES
from ccu_jax.runs import results as rows
from ccu_jax.train.loop import Loop
from tests import toy
from tests.end_to_end.launching import run_command

TUNED = [name for name in METHODS if name not in REFERENCES]


# --- where to look --------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNED)
def test_every_method_has_a_space_of_settings_that_a_run_would_take(name):
    section = getattr(Config(), name)
    fields = {field.name for field in dataclasses.fields(section)}
    ranges = space(name, section)
    assert ranges and set(ranges) <= fields
    for settings in tune.candidates(name, section, 9):
        config = Config(name="any")
        for key, value in settings.items():
            config = replace_value(config, f"{name}.{key}", value)  # of the right type
        check_values(config)


def test_as_many_trials_for_every_method_the_configured_one_first():
    for name in TUNED:
        section = getattr(Config(), name)
        found = tune.candidates(name, section, 12)
        assert len(found) == 12 and found[0] == {}
        assert found == tune.candidates(name, section, 12)
        # Each range is looked through from end to end.
        for key, of in space(name, section).items():
            values = np.array([settings[key] for settings in found[1:]], float)
            assert values.min() >= of.low * 0.99 and values.max() <= of.high * 1.01
            if isinstance(getattr(section, key), float):
                share = (values - of.low) / (of.high - of.low)
                if of.log:
                    share = np.log(values / of.low) / np.log(of.high / of.low)
                assert share.min() < 0.25 and share.max() > 0.75


# --- the objective --------------------------------------------------------------------


def judged(unseen=0.5, retain=0.9, auc=0.6, diverged=None):
    one = {view: {"accuracy": unseen} for view in ("image", "text", "fused")}
    kept = {view: {"accuracy": retain} for view in ("image", "text", "fused")}
    return {
        "metric": "accuracy",
        "scores": {"unseen": one, "retain": kept},
        "attack_auc": {"image": auc, "fused": auc, "pair": auc},
        "diverged": diverged,
    }


def test_the_objective_is_zero_for_the_reference_and_grows_with_every_fault():
    reference = judged()
    assert tune.objective(judged(), reference) == 0
    # A leak either way is one, a loss of score is one, and a gain is none.
    assert tune.objective(judged(auc=0.7), reference) == pytest.approx(0.2)
    assert tune.objective(judged(auc=0.5), reference) == pytest.approx(0.2)
    assert tune.objective(judged(unseen=0.4), reference) == pytest.approx(0.1)
    assert tune.objective(judged(unseen=0.6), reference) == pytest.approx(-0.1)
    assert tune.objective(judged(retain=0.7), reference) == pytest.approx(0.2)
    assert tune.objective(judged(retain=1.0), reference) == 0
    assert tune.objective(judged(diverged="step 3"), reference) == math.inf
    silent = judged() | {"attack_auc": {"image": None, "fused": 0.6, "pair": 0.6}}
    assert tune.objective(silent, reference) == math.inf


# --- variants -------------------------------------------------------------------------


def bench(tmp_path):
    """A bench and a problem in memory, with stored features."""
    data = toy.make_dataset(80)
    problem = toy.make_problem(parallel.vmap(1), data)
    every = np.arange(len(data.labels))
    columns = make_compute_fn(
        problem.forward, problem.params, problem.table, problem.seed
    )(every)
    store = types.SimpleNamespace(
        take=lambda rows: {name: x[rows] for name, x in columns.items()},
        table=lambda table: table,
    )
    loop = Loop(problem.config.run, problem.executor, pytest.fail)
    made = types.SimpleNamespace(
        workdir=tmp_path,
        data=data,
        table=problem.table,
        forward=problem.forward,
        loop=loop,
        config=problem.config,
    )
    return made, problem._replace(store=store)


def test_a_variant_runs_under_its_settings_and_is_kept(tmp_path, monkeypatch):
    made, problem = bench(tmp_path)
    plain = variants.run(made, problem, Variant("ccu", {}))
    longer = variants.run(made, problem, Variant("ccu", {"steps": 5}))
    assert (plain["steps"], longer["steps"]) == (3, 5)
    assert plain["attack_auc"] != longer["attack_auc"]
    assert plain["scores"]["test"]["fused"] and plain["attack_auc"]["pair"] is not None
    # No second run: what was kept is read, and it is the same.
    monkeypatch.setattr(made.loop, "run", lambda *args: pytest.fail("ran again"))
    assert variants.run(made, problem, Variant("ccu", {"steps": 5})) == longer
    path = variants.place(tmp_path, problem.seed, Variant("ccu", {"steps": 5}))
    assert path.exists()
    rows.write_result(path, {**longer, "fingerprint": "another"})
    with pytest.raises(UserError, match="belongs to other data"):
        variants.run(made, problem, Variant("ccu", {"steps": 5}))
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        variants.run(made, problem, Variant("ccu", {"steps": 5}))


def test_choosing_between_settings_looks_at_no_test_row(tmp_path, monkeypatch):
    made, problem = bench(tmp_path)
    seen, outputs = [], Forward.outputs

    def watched(self, params, table, rows):
        seen.append(np.asarray(rows))
        return outputs(self, params, table, rows)

    monkeypatch.setattr(Forward, "outputs", watched)
    chosen = variants.without_test(problem)
    row = variants.run(made, chosen, Variant("ccu", {}))
    assert seen and not set(np.concatenate(seen)) & set(problem.sets.test)
    assert row["scores"]["test"] == {"image": {}, "text": {}, "fused": {}}
    assert row["scores"]["unseen"]["fused"] and row["attack_auc"]["fused"] is not None
    # What was judged without test rows does not pass for what was judged with them.
    monkeypatch.undo()
    whole = variants.run(made, problem, Variant("ccu", {}))
    assert whole["scores"]["test"]["fused"]


# --- ablation -------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_objective_of_our_methods_is_switched_off_once(name):
    section = getattr(Config(), name)
    found = ablate.parts(section)
    assert found["as it is"] == {}
    for part, changes in list(found.items())[1:]:
        changed = dataclasses.replace(section, **changes)
        assert changed != section, part
    weights = {
        "inverse_contrast",
        "pair_dissociation",
        "retention",
        "separation",
        "target_match",
    }
    weights |= {"match_confidence", "gated_push", "task_loss", "heldout_retention"}
    on = {key for key in weights if getattr(section, key, 0)}
    off = {key for c in found.values() for key, value in c.items() if value == 0}
    assert on <= off


def test_the_table_of_an_ablation_compares_parts_with_the_reference():
    def row(method, part, auc):
        seconds = {"seconds": {"unlearn": 2.0}}
        return {**judged(auc=auc), **seconds, "method": method, "part": part}

    found = [
        row("retrain_visual", "retrain_visual", 0.5),
        row("ccu", "as it is", 0.6),
        row("ccu", "as it is", 0.7),
        row("ccu", "no pair dissociation", 0.9) | {"diverged": "step 2"},
        row("ccu_plus", "as it is", 0.8),
    ]
    header, lines = ablate.table(found, "ccu")
    column = header.index("attack AUC pair")
    assert [line[0] for line in lines] == [
        "retrain_visual",
        "as it is",
        "no pair dissociation (diverged: 1)",
    ]
    assert lines[1][column].startswith("0.650 ±")
    assert lines[2][column] == "0.900"


# --- the commands ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "work, methods", [(tune.tune, ("original",)), (ablate.ablate, ("scrub",))]
)
def test_nothing_to_vary_is_refused_before_anything_runs(tmp_path, work, methods):
    config = dataclasses.replace(load_config("tiny"), methods=methods)
    more = (3,) if work is tune.tune else ()
    with pytest.raises(UserError, match="methods: none of them"):
        work(config, tmp_path, *more)
    assert not any(tmp_path.iterdir())
    several = dataclasses.replace(config, methods=("scrub", "ccu"))
    unlearn = dataclasses.replace(config.unlearn, num_requests=3)
    with pytest.raises(UserError, match="unlearn.num_requests=3"):
        work(dataclasses.replace(several, unlearn=unlearn), tmp_path, *more)
    section = dataclasses.replace(config.scrub, batch=63)
    config = dataclasses.replace(config, scrub=section, methods=("scrub",))
    if work is tune.tune:
        with pytest.raises(UserError, match="scrub.batch=63"):
            work(config, tmp_path, *more)
        assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_method_that_falls_apart_is_named_and_stops_no_other(tmp_path):
    run_command(
        *("--config", "tiny", "--set", "train.epochs=2", "--workdir", tmp_path / "a"),
        *("--set", "finetune.learning_rate=1e30", "--methods", "finetune,cf_head"),
    )
    rows = json.loads((tmp_path / "a" / "results.json").read_text())
    told = {row["method"]: row["diverged"] for row in rows}
    assert set(told) == {"original", "finetune", "cf_head"}
    assert told["finetune"] and not told["original"] and not told["cf_head"]
    table = (tmp_path / "a" / "table.md").read_text()
    assert "finetune (diverged)" in table and "cf_head (diverged)" not in table


@pytest.mark.slow
def test_tuning_and_ablation_go_on_where_they_were_and_end_the_same(tmp_path):
    flags = ("--config", "tiny", "--set", "train.epochs=1", "--workdir", tmp_path / "a")
    look = (*flags, "--methods", "cf_head,ssd", "--seeds", "5,6", "--tune", "6")
    run_command(*look)
    text = (tmp_path / "a" / "tuning.json").read_text()
    told = json.loads(text)
    assert set(told["winners"]) == {"cf_head", "ssd"}
    for trials in told["methods"].values():
        assert len(trials) == 6
        # The best three of the first seed have been on the other one, too, and so has
        # the configuration itself.
        finals = [trial for trial in trials if len(trial["objectives"]) == 2]
        assert trials[: len(finals)] == finals and {} in [t["settings"] for t in finals]
        assert len(finals) in (3, 4)
        best = sorted(trials, key=lambda trial: trial["objectives"][0])[:3]
        assert all(trial in finals for trial in best)
        means = [np.mean(trial["objectives"]) for trial in finals]
        assert means == sorted(means)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "variants").iterdir()}
    gone = next(iter(files))
    gone.unlink()
    run_command(*look)
    again = json.loads((tmp_path / "a" / "tuning.json").read_text())
    assert again["winners"] == told["winners"]
    for path, time in files.items():
        assert path == gone or path.stat().st_mtime_ns == time

    run_command(*flags, "--methods", "ccu_no_stop", "--seeds", "5", "--ablate")
    found = json.loads((tmp_path / "a" / "ablation.json").read_text())
    parts = {row["part"] for row in found if row["method"] == "ccu_no_stop"}
    assert parts == set(ablate.parts(load_config("tiny").ccu_no_stop))
