"""Tuning and ablation: candidates, the objective, variants and the table."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Config, replace_value
from ccu_jax.distributed import executors
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.experiments import ablate, tune, variants
from ccu_jax.experiments.variants import run_variant
from ccu_jax.methods import METHODS, OURS, REFERENCES
from ccu_jax.runs.results import write_result
from tests import toy
from tests.end_to_end.launching import run_command


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(REFERENCES)))
def test_candidates_are_valid_settings_spread_over_all_ranges(name):
    section = getattr(Config(), name)
    space = tune.search_space(name, section)
    assert space and set(space) <= {field.name for field in dataclasses.fields(section)}
    settings = tune.draw_candidates(name, section, 12)
    assert len(settings) == 12 and settings[0] == {}
    assert settings == tune.draw_candidates(name, section, 12)
    for values in settings:
        for key, value in values.items():
            replace_value(Config(), f"{name}.{key}", value)  # checks type and range
    for key, range_ in space.items():
        values = np.array([values[key] for values in settings[1:]], float)
        assert values.min() >= range_.low * 0.99 and values.max() <= range_.high * 1.01
        if isinstance(getattr(section, key), float):
            assert values.min() < range_.value_at(
                0.25
            ) and values.max() > range_.value_at(0.75)


def make_result(unseen=0.5, retain=0.9, auc=0.6, diverged=None, **fields):
    views = ("image", "text", "fused")
    return {
        "metric": "accuracy",
        "scores": {
            "unseen": {view: {"accuracy": unseen} for view in views},
            "retain": {view: {"accuracy": retain} for view in views},
        },
        "attack_auc": {"image": auc, "fused": auc, "pair": auc},
        "diverged": diverged,
        **fields,
    }


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 0),
        ({"auc": 0.7}, 0.2),  # a leak in either direction
        ({"auc": 0.5}, 0.2),
        ({"unseen": 0.4}, 0.1),
        ({"unseen": 0.6}, -0.1),
        ({"retain": 0.7}, 0.2),
        ({"retain": 1.0}, 0),
        ({"diverged": "step 3"}, math.inf),
        ({"attack_auc": {"image": None, "fused": 0.6, "pair": 0.6}}, math.inf),
    ],
)
def test_objective_is_the_distance_from_the_reference(changes, expected):
    result, reference = make_result(**changes), make_result()
    assert tune.objective(result, reference) == pytest.approx(expected)


@pytest.fixture
def ctx_and_problem(tmp_path):
    data = toy.make_dataset(80)
    problem = toy.with_stored_features(toy.make_problem(executors.vmap(1), data))
    return toy.make_context(problem, data, tmp_path), problem


def test_variant_is_run_once_with_its_settings(ctx_and_problem, monkeypatch):
    ctx, problem = ctx_and_problem
    variant = ("ccu", {"steps": 5})
    configured = run_variant(ctx, problem, "ccu", {})
    longer = run_variant(ctx, problem, *variant)
    assert (configured["steps"], longer["steps"]) == (3, 5)
    assert configured["attack_auc"] != longer["attack_auc"]
    assert configured["scores"]["test"]["fused"]
    assert configured["attack_auc"]["pair"] is not None
    monkeypatch.setattr(ctx.loop, "run", lambda *args: pytest.fail("ran again"))
    assert run_variant(ctx, problem, *variant) == longer
    path = variants.variant_path(ctx.workdir, problem, *variant)
    write_result(path, {**longer, "fingerprint": "another"})
    with pytest.raises(UserError, match=f"{path}: made from other data"):
        run_variant(ctx, problem, *variant)
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path}: damaged"):
        run_variant(ctx, problem, *variant)


def test_tuning_evaluates_no_test_row(ctx_and_problem, monkeypatch):
    ctx, problem = ctx_and_problem
    rows_seen, outputs = [], Forward.compute_outputs

    def record(self, params, table, rows):
        rows_seen.append(np.asarray(rows))
        return outputs(self, params, table, rows)

    monkeypatch.setattr(Forward, "compute_outputs", record)
    untested = variants.without_test_rows(problem)
    result = run_variant(ctx, untested, "ccu", {})
    assert rows_seen and not set(np.concatenate(rows_seen)) & set(problem.sets.test)
    assert result["scores"]["test"] == {"image": {}, "text": {}, "fused": {}}
    assert result["scores"]["unseen"]["fused"]
    assert result["attack_auc"]["fused"] is not None
    # The stored result does not stand in for one with test rows.
    monkeypatch.undo()
    tested = run_variant(ctx, problem, "ccu", {})
    assert tested["scores"]["test"]["fused"]


@pytest.mark.parametrize("name", OURS)
def test_every_loss_of_our_methods_is_ablated(name):
    section = getattr(Config(), name)
    ablations = ablate.select_ablations(section)
    assert ablations.pop(ablate.AS_CONFIGURED) == {}
    for ablation, settings in ablations.items():
        assert dataclasses.replace(section, **settings) != section, ablation
    weights = "inverse_contrast pair_dissociation retention separation target_match "
    weights += "match_confidence gated_push task_loss heldout_retention"
    for weight in weights.split():
        is_used = bool(getattr(section, weight, 0))
        assert ({weight: 0.0} in ablations.values()) == is_used, weight


def test_ablation_table_has_means_over_seeds_below_the_reference():
    fields = ("method", "ablation", "auc", "seed", "diverged")
    results = [
        make_result(seconds={"unlearn": 2.0}, **dict(zip(fields, values, strict=True)))
        for values in (
            ("retrain_visual", "retrain_visual", 0.5, 0, None),
            ("ccu", "as configured", 0.6, 0, None),
            ("ccu", "as configured", 0.7, 1, None),
            ("ccu", "no pair dissociation", 0.9, 0, "step 2"),
            ("ccu_plus", "as configured", 0.8, 0, None),
        )
    ]
    table = ablate.build_table(results, "ccu")
    column = table.header.index("attack AUC pair")
    titles = ["retrain_visual", "as configured", "no pair dissociation (diverged: 1)"]
    assert [row[0] for row in table.rows] == titles
    assert table.rows[1][column].startswith("0.650 ±")
    assert table.rows[2][column] == "0.900"


@pytest.mark.parametrize(
    "command, methods, args",
    [(tune.tune, ("original",), (3,)), (ablate.ablate, ("scrub",), ())],
)
def test_invalid_configuration_is_rejected_before_anything_is_written(
    tmp_path, command, methods, args
):
    for settings, message in (
        ([f"methods={','.join(methods)}"], f"methods={methods[0]}: no .*"),
        (["methods=scrub,ccu", "unlearn.num_requests=3"], "unlearn.num_requests=3"),
        (["methods=ccu", "ccu.batch=63"], "ccu.batch=63"),
    ):
        with pytest.raises(UserError, match=message):
            command(load_config("tiny", settings), tmp_path, *args)
    assert not any(tmp_path.iterdir())


@pytest.mark.smoke
@pytest.mark.slow
def test_tuning_and_ablation_resume_and_end_with_the_same_winners(tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config", "tiny", "--set", "train.epochs=1", "--workdir", workdir)
    argv = (*flags, "--methods", "cf_head,ssd", "--seeds", "5,6", "--tune", "6")
    run_command(*argv)
    tuning = json.loads((workdir / "tuning.json").read_text())
    assert set(tuning["winners"]) == {"cf_head", "ssd"}
    for trials in tuning["methods"].values():
        assert len(trials) == 6
        # The best three of the first seed, and the configured settings.
        finalists = [trial for trial in trials if len(trial["objectives"]) == 2]
        assert trials[: len(finalists)] == finalists and len(finalists) in (3, 4)
        assert {} in [trial["settings"] for trial in finalists]
        best = sorted(trials, key=lambda trial: trial["objectives"][0])[:3]
        assert all(trial in finalists for trial in best)
        means = [np.mean(trial["objectives"]) for trial in finalists]
        assert means == sorted(means)
    times_ns = {p: p.stat().st_mtime_ns for p in (workdir / "variants").iterdir()}
    removed = next(iter(times_ns))
    removed.unlink()
    run_command(*argv)
    again = json.loads((workdir / "tuning.json").read_text())
    assert again["winners"] == tuning["winners"]
    for path, time_ns in times_ns.items():
        assert path == removed or path.stat().st_mtime_ns == time_ns

    run_command(*flags, "--methods", "ccu_no_stop", "--seeds", "5", "--ablate")
    results = json.loads((workdir / "ablation.json").read_text())
    ablated = {r["ablation"] for r in results if r["method"] == "ccu_no_stop"}
    assert ablated == set(ablate.select_ablations(load_config("tiny").ccu_no_stop))
