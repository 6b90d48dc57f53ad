"""Runs with data-dependent rules and several requests, resumed and purged."""

import dataclasses
import json
import pkgutil
import shutil
from unittest import mock

import numpy as np
import pytest

from ccu_jax.config.schema import Unlearn
from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import load_predictions
from ccu_jax.experiments.run import run
from ccu_jax.storage.records import add_line_checksum
from tests import toy

METHODS = ("original", "retrain_visual", "finetune", "ccu")


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Makes a small configuration with a rule, on a data set of 300 images."""
    data = toy.write_pairs(tmp_path_factory.mktemp("own") / "images", rows=300)
    config = toy.make_config(train={"epochs": 2}, finetune={"epochs": 1})

    def make_config(rule, methods=METHODS, **unlearn):
        return dataclasses.replace(
            config, data=data, methods=methods, unlearn=Unlearn(rule=rule, **unlearn)
        )

    return make_config


def outputs(workdir, method):
    return load_predictions(workdir / "outputs" / f"{method}-0.npz")


def listed_ids(workdir):
    lines = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def read_outcome(workdir):
    """Reads predictions and unlearn sets."""
    return {
        path.name: path.read_bytes()
        for folder in ("outputs", "unlearn_sets")
        for path in sorted((workdir / folder).iterdir())
    }


@pytest.fixture(scope="module")
def config(make_config):
    return make_config("memorized:0.2", num_requests=2)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that unlearns what was memorized, in two requests."""
    workdir = tmp_path_factory.mktemp("memorized")
    run(config, workdir)
    return workdir


@pytest.mark.slow
def test_memorized_rows_are_drawn_once_for_all_methods(make_config, finished, tmp_path):
    ids = listed_ids(finished)
    assert len(ids) > 20
    for method in METHODS:
        predicted = outputs(finished, method)
        assert sorted(predicted.id[predicted.split == "unlearn"]) == sorted(ids)
        assert len(set(predicted.id.tolist())) == len(predicted.id)
        assert (predicted.split == "unseen").sum() >= 20
    # The original does not depend on the unlearn set.
    run(make_config("random:0.2", ("original",)), tmp_path)
    assert sorted(listed_ids(tmp_path)) != sorted(ids)
    originals = [outputs(workdir, "original") for workdir in (finished, tmp_path)]
    common, *rows = np.intersect1d(*(x.id for x in originals), return_indices=True)
    assert len(common) > 200
    logits = [x.logits["fused"][i] for x, i in zip(originals, rows, strict=True)]
    np.testing.assert_array_equal(*logits)


class Killed(Exception):
    """A simulated kill."""


@pytest.mark.slow
def test_run_killed_around_drawing_ends_with_the_same_bits(config, finished, tmp_path):
    estimate = "ccu_jax.evaluate.memorization.estimate_memorization"
    predict = "ccu_jax.evaluate.predictions.predict_all_splits"
    # The function that is killed, and how many of its calls are let through.
    for name, num_calls in (
        (estimate, 0),
        (predict, 0),
        ("ccu_jax.evaluate.predictions.compute_scores", 0),
        (predict, 3),  # in the second request of finetune
    ):
        function, results = pkgutil.resolve_name(name), [mock.DEFAULT] * num_calls
        kill = mock.patch(name, wraps=function, side_effect=[*results, Killed])
        with kill, pytest.raises(Killed):
            run(config, tmp_path)
        is_drawn = (tmp_path / "unlearn_sets" / "0.txt").exists()
        assert is_drawn == (name != estimate)
    assert list(tmp_path.glob("checkpoints/finetune-0/steps*/request-1/params/*"))
    results = run(config, tmp_path)
    assert read_outcome(tmp_path) == read_outcome(finished)
    assert {len(result["requests"]) for result in results} == {0, 2}
    assert not list(tmp_path.glob("checkpoints/*/steps*"))


@pytest.mark.slow
def test_finished_run_is_shown_after_a_purge_and_without_checkpoints(
    config, finished, tmp_path
):
    copy = shutil.copytree(finished, tmp_path / "run")
    results = json.loads((finished / "results.json").read_text())
    assert run(config, copy, purge=True) == results
    shutil.rmtree(copy / "checkpoints")
    assert run(config, copy) == results
    assert read_outcome(copy) == read_outcome(finished)
    (copy / "unlearn_sets" / "0.txt").write_text(add_line_checksum("row1\n"))
    with pytest.raises(UserError, match="differs from the unlearn set"):
        run(config, copy)
    (copy / "outputs" / "original-0.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="original-0.npz: missing or damaged"):
        run(config, copy)


@pytest.mark.smoke
@pytest.mark.slow
def test_cluster_is_unlearned_purged_and_shown(make_config, tmp_path):
    config = make_config("cluster:0.1", ("original", "ccu"))
    results = run(config, tmp_path, purge=True)
    predicted = outputs(tmp_path, "ccu")
    unlearned = predicted.id[predicted.split == "unlearn"]
    assert sorted(listed_ids(tmp_path)) == sorted(unlearned)
    # The images that the rule needs are removed.
    assert run(config, tmp_path) == results


def test_invalid_rule_or_number_of_requests_is_rejected_before_training(
    make_config, tmp_path
):
    config = make_config("random:0.05", num_requests=50)
    with pytest.raises(UserError, match="unlearn.num_requests=50.*at most that many"):
        run(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match="memorized:2: expected a fraction"):
        run(make_config("memorized:2"), tmp_path)
