"""Whole runs with rules that look at the rows, and with several requests."""

import dataclasses
import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from ccu_jax.config.schema import Data, Unlearn
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.experiments import run
from ccu_jax.storage.records import add_line_checksum
from tests import toy
from tests.evaluate.test_feature_store import pictures

METHODS = ("original", "retrain_visual", "finetune", "ccu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "pictures"
    pictures(folder, rows=300)
    tiny = toy.make_config(train={"epochs": 2}, finetune={"epochs": 1})
    own = Data(dir=str(folder), image_size=8, text_length=6, vocabulary=120)
    return dataclasses.replace(tiny, data=own, methods=METHODS)


def asked(settings, rule, methods=METHODS, **unlearn):
    chosen = Unlearn(rule=rule, **unlearn)
    return dataclasses.replace(settings, unlearn=chosen, methods=methods)


def outputs(workdir, method):
    return predictions.load_predictions(workdir / "outputs" / f"{method}-0.npz")


def listed(workdir):
    lines = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def bits(workdir):
    """Of everything that a run came to."""
    return {
        path.name: path.read_bytes()
        for folder in ("outputs", "unlearn_sets")
        for path in sorted((workdir / folder).iterdir())
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a run that forgets in two requests what was memorised."""
    workdir = tmp_path_factory.mktemp("memorised") / "run"
    workdir.mkdir()
    run.run(asked(settings, "memorised:0.2", num_requests=2), workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.slow
def test_what_was_memorised_is_drawn_once_and_evaluated_by_all(
    settings, finished, tmp_path
):
    ids = listed(finished)
    assert len(ids) > 20
    for method in METHODS:
        found = outputs(finished, method)
        assert sorted(found.id[found.split == "unlearn"]) == sorted(ids)
        assert len(set(found.id.tolist())) == len(found.id)
        assert (found.split == "unseen").sum() >= 20
    # The original hangs on no unlearn set.
    other = tmp_path / "random"
    other.mkdir()
    run.run(asked(settings, "random:0.2", ("original",)), other)
    assert sorted(listed(other)) != sorted(ids)
    one, two = outputs(finished, "original"), outputs(other, "original")
    said = dict(zip(one.id.tolist(), one.logits["fused"], strict=True))
    again = dict(zip(two.id.tolist(), two.logits["fused"], strict=True))
    shared = sorted(said.keys() & again.keys())
    assert len(shared) > 200
    for name in shared:
        np.testing.assert_array_equal(said[name], again[name])


class Killed(Exception):
    pass


def kill_after(monkeypatch, calls, name):
    """Kills the run at a call, after so many that are let through."""
    module, _, function = name.rpartition(".")
    real = getattr(importlib.import_module(module), function)
    left = [calls]

    def killed(*args, **kwargs):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{function}", killed)


@pytest.mark.slow
def test_a_run_killed_around_the_drawing_ends_with_the_same_bits(
    settings, finished, tmp_path, monkeypatch
):
    config = asked(settings, "memorised:0.2", num_requests=2)
    workdir = tmp_path / "run"
    workdir.mkdir()
    moments = [
        (0, "ccu_jax.evaluate.memorization.memory"),  # the original is trained
        (
            0,
            "ccu_jax.evaluate.predictions.predict_all_splits",
        ),  # it has said what is to be forgotten
        (0, "ccu_jax.runs.results.build_result"),  # it was evaluated
        # Two whole evaluations, then the first request of finetune.
        (3, "ccu_jax.evaluate.predictions.predict_all_splits"),
    ]
    for calls, name in moments:
        with monkeypatch.context() as patch:
            kill_after(patch, calls, name)
            with pytest.raises(Killed):
                run.run(config, workdir)
        drawn = (workdir / "unlearn_sets" / "0.txt").exists()
        assert drawn == (name != "ccu_jax.evaluate.memorization.memory")
    assert list(workdir.glob("checkpoints/finetune-0/steps*/request-1/params/*"))
    rows = run.run(config, workdir)
    assert bits(workdir) == bits(finished)
    assert {len(row["requests"]) for row in rows} == {0, 2}
    assert not list(workdir.glob("checkpoints/*/steps*"))


@pytest.mark.slow
def test_a_finished_run_is_shown_without_its_checkpoints_and_after_a_purge(
    settings, finished, copy
):
    config = asked(settings, "memorised:0.2", num_requests=2)
    before = json.loads((finished / "results.json").read_text())
    assert run.run(config, copy, purge=True) == before
    shutil.rmtree(copy / "checkpoints")
    assert run.run(config, copy) == before
    assert bits(copy) == bits(finished)
    other = add_line_checksum("row1\n")
    (copy / "unlearn_sets" / "0.txt").write_text(other)
    with pytest.raises(UserError, match="lists another unlearn set"):
        run.run(config, copy)
    (copy / "outputs" / "original-0.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="original-0.npz: missing or damaged"):
        run.run(config, copy)


@pytest.mark.slow
def test_each_request_has_its_cost_and_what_came_of_it(finished):
    rows = {
        row["method"]: row
        for row in json.loads((finished / "results.json").read_text())
    }
    for method, row in rows.items():
        told = row["requests"]
        if method in ("original", "retrain_visual"):
            assert told == []
            continue
        assert len(told) == 2
        assert sum(request["count"] for request in told) == row["unlearn_set"]["count"]
        for name in ("start", "steps", "unlearn", "compile"):
            parts = [request["seconds"][name] for request in told]
            assert row["seconds"][name] == pytest.approx(sum(parts))
        last = told[-1]
        for view in ("image", "text", "fused", "pair"):
            attack = row["attack_auc"][view]
            assert last["attack_auc"]["all"][view] == pytest.approx(attack, abs=1e-6)
        for view, scores in row["scores"]["test"].items():
            assert last["scores"]["test"][view] == pytest.approx(scores, abs=1e-6)
        assert set(last["attack_auc"]) == {"all", "first", "this"}
    assert rows["ccu"]["text_unchanged"] is True
    table = (finished / "table.md").read_text("utf-8")
    page = (finished / "report.html").read_text("utf-8")
    assert "Sequential requests" in table and "Sequential requests" in page
    for number in (1, 2):
        assert f"| ccu | {number} | " in table
        assert f"| finetune | {number} | " in table
    assert "| retrain_visual | 1 |" not in table


@pytest.mark.slow
def test_a_cluster_is_forgotten_purged_and_shown(settings, tmp_path):
    config = asked(settings, "cluster:0.1", ("original", "ccu"))
    rows = run.run(config, tmp_path, purge=True)
    found = outputs(tmp_path, "ccu")
    assert sorted(listed(tmp_path)) == sorted(found.id[found.split == "unlearn"])
    assert "Sequential requests" not in (tmp_path / "table.md").read_text("utf-8")
    # The pictures by which it was found are gone.
    assert run.run(config, tmp_path) == rows


def test_too_many_requests_are_refused_before_the_first_step(settings, tmp_path):
    config = asked(settings, "random:0.05", num_requests=50)
    with pytest.raises(UserError, match="unlearn.num_requests=50.*at most that many"):
        run.run(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match="unlearn.num_requests=0: must be at least 1"):
        run.run(asked(settings, "random:0.05", num_requests=0), tmp_path)
    # What only the original tells is drawn later, and wrong shares are found at once.
    with pytest.raises(UserError, match="memorised:2: the share"):
        run.run(asked(settings, "memorised:2"), tmp_path)
