"""Requests are split in order, start from the previous model, and can be resumed."""

import itertools
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from ccu_jax.config.schema import Unlearn
from ccu_jax.distributed import executors
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL
from ccu_jax.runs import requests
from ccu_jax.train import checkpoint
from ccu_jax.unlearn_sets import splits
from tests import toy

NUM_ROWS = 112


def split(data, sets, count, seed=0):
    return requests.split_requests(data, Unlearn(num_requests=count), seed, sets)


@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_requests_split_the_unlearn_set_in_the_order_of_forgetting(count, per_group):
    data = toy.make_dataset(700, per_group=per_group)
    sets = splits.draw_sets(data, "random:0.2", 3, 0.2)
    parts = split(data, sets, count, seed=3)
    assert len(parts) == count
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), sets.unlearn)
    position = {g: n for n, g in enumerate(splits.unlearning_order(data, 3))}
    positions = [{position[g] for g in data.group[rows].tolist()} for rows in parts]
    for before, after in itertools.pairwise(positions):
        assert max(before) < min(after)
    num_images = [data.has_image[rows].sum() for rows in parts]
    assert max(num_images) - min(num_images) <= 2 * per_group
    # The file of the unlearn set lists the ids in the same order.
    text = splits.format_unlearn_set(data, sets, 3, "random:0.2")
    ids = iter(line for line in text.splitlines() if not line.startswith("# "))
    for rows in parts:
        assert set(itertools.islice(ids, len(rows))) == set(data.id[rows])


@pytest.mark.parametrize("rule, large", [("random:0.1", 0), ("random:0.9", 300)])
def test_every_request_has_an_image(rule, large):
    data = toy.make_dataset(700, per_group=4)
    is_large = np.arange(700) < large  # one group, which may dominate the unlearn set
    data = data._replace(
        group=np.where(is_large, "large", data.group),
        split=np.where(is_large, "train", data.split),
    )
    rng = np.random.default_rng(0)
    for seed in range(20):
        sparse = data._replace(has_image=rng.random(700) < 0.15)
        sets = splits.draw_sets(sparse, rule, seed, 0.1)
        groups = splits.list_unlearned_groups(sparse, sets, seed)
        max_requests = sum(sparse.has_image[rows].any() for rows in groups)
        for count in (min(9, max_requests), max_requests):
            parts = split(sparse, sets, count, seed)
            assert all(sparse.has_image[rows].any() for rows in parts)
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), sets.unlearn)
        with pytest.raises(UserError, match=f"{max_requests} groups with images"):
            split(sparse, sets, max_requests + 1, seed)


@pytest.fixture(scope="module")
def data():
    return toy.make_dataset(NUM_ROWS)


@pytest.fixture(scope="module")
def problem(data):
    # Few checkpoints, as the test of kills runs once for each.
    config = toy.make_config(run={"checkpoint_steps": 2}, finetune={"epochs": 1.0})
    problem = toy.make_problem(executors.vmap(2), data, config, rule="random:0.3")
    return toy.with_stored_features(problem)


@pytest.fixture(scope="module")
def run(problem, data):
    """A function that runs a method on some requests."""
    loop = toy.make_loop(problem)

    def run(workdir, count, method, problem=problem, report_progress=None):
        ctx = toy.make_context(problem, data, workdir, loop, num_requests=count)
        stage: Any = toy.NullStage()
        stage.report_progress = report_progress or stage.report_progress
        return requests.run_requests(ctx, problem, method, workdir / "steps", stage)

    return run


@pytest.fixture
def solved(monkeypatch):
    """The problems that methods are called with, each twice: to compile and to run."""
    problems = []

    def record(name, problem):
        problems.append(problem)
        return METHODS[name](problem)

    methods = {n: lambda problem, name=n: record(name, problem) for n in METHODS}
    monkeypatch.setattr(requests, "METHODS", methods)
    return problems


@pytest.mark.parametrize("method", ["ccu", "finetune"])
def test_each_request_starts_from_the_previous_model(
    problem, data, tmp_path, run, solved, method
):
    activities = []
    outcome, records = run(
        tmp_path, 3, method, report_progress=lambda text, *_: activities.append(text)
    )
    assert activities == ["request 1/3", "request 2/3", "request 3/3"]
    parts = split(data, problem.sets, 3)
    problems = solved[::2]
    assert len(problems) == len(records) == 3
    expected_params = problem.params
    for number, request in enumerate(problems):
        later = np.concatenate([problem.sets.retain, *parts[number + 1 :]])
        sets = problem.sets._replace(retain=np.sort(later), unlearn=parts[number])
        for rows, expected in zip(request.sets, sets, strict=True):
            np.testing.assert_array_equal(rows, expected)
        # Stored features are valid as long as the trunk is the original's.
        assert (request.store is None) == (method == "finetune" and number > 0)
        assert toy.trees_equal(request.params, expected_params)
        folder = tmp_path / "steps" / f"request-{number + 1}" / "params"
        saved = checkpoint.restore(folder, problem.params, toy.fail_on_warning)
        assert saved is not None
        expected_params = saved.tree
        heads = (x["image_head"] for x in (request.params, expected_params))
        assert not toy.trees_equal(*heads)
    assert len({p.seed for p in problems}) == 3 and problems[0].seed == problem.seed
    _assert_records_describe_the_model(data, problem, parts, outcome, records, method)


def _assert_records_describe_the_model(data, problem, parts, outcome, records, method):
    assert (set(outcome.params) <= set(TAIL)) == (method == "ccu")
    assert outcome.steps == sum(record["steps"] for record in records)
    for name in ("start", "steps", "compile"):
        seconds = [record["seconds"][name] for record in records]
        assert outcome.seconds[name] == sum(seconds)
    for record, rows in zip(records, parts, strict=True):
        seconds = record["seconds"]
        assert seconds["unlearn"] == seconds["start"] + seconds["steps"] > 0
        assert record["count"] == len(rows)
        assert record["images"] == data.has_image[rows].sum()
        assert set(record["attack_auc"]) == {"all", "first", "this"}
        assert set(record["scores"]) == {"test"}
    assert records[0]["attack_auc"]["all"] == records[0]["attack_auc"]["first"]
    params = {**problem.params, **outcome.params}
    attacked = {"all": problem.sets.unlearn, "first": parts[0], "this": parts[2]}
    for name, rows in attacked.items():
        sets = problem.sets._replace(unlearn=rows)
        predicted = predictions.predict_all_splits(
            problem.forward, params, problem.table, data, sets
        )
        scores = predictions.compute_scores(predicted)["test"]
        for view, recorded in records[-1]["scores"]["test"].items():
            assert recorded == pytest.approx(scores[view])
        attacks = predictions.attack_auc(predicted)
        for view in ("image", "text", "fused", "pair"):
            recorded = records[-1]["attack_auc"][name][view]
            assert recorded == pytest.approx(attacks[view])


def test_updated_store_has_the_logits_of_the_current_model(problem, tmp_path, run):
    rows = np.arange(0, NUM_ROWS, 3)
    outcome, _ = run(tmp_path, 1, "ccu")
    params = {**problem.params, **outcome.params}
    computed = toy.make_compute_fn(problem._replace(params=params))(rows)
    store = problem.store
    updated = requests.UpdatedStore(store, problem.forward, params, problem.table)
    columns = updated.take(rows)
    assert columns.keys() == computed.keys()
    for name, column in columns.items():
        np.testing.assert_allclose(column, computed[name], atol=1e-5, err_msg=name)
    before = store.take(rows)
    assert np.abs(before["original_image"] - columns["original_image"]).max() > 0.01
    assert before["original_text"].tobytes() == columns["original_text"].tobytes()


class Killed(Exception):
    """A simulated kill."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ccu", "finetune"])
def test_run_killed_at_any_checkpoint_ends_with_the_same_bits(
    tmp_path, run, monkeypatch, method
):
    expected, records = run(tmp_path / "whole", 3, method)
    save, saves_left = checkpoint.save, 0

    def save_or_kill(folder, *args, **kwargs):
        nonlocal saves_left
        if saves_left == 0:
            raise Killed
        saves_left -= 1
        save(folder, *args, **kwargs)
        if saves_left == 0 and folder.name == "params":
            raise Killed

    monkeypatch.setattr("ccu_jax.train.checkpoint.save", save_or_kill)
    for num_saves in range(1, 30):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        saves_left, is_killed = num_saves, False
        try:
            run(tmp_path / "run", 3, method)
        except Killed:
            is_killed = True
        saves_left = 99
        outcome, again = run(tmp_path / "run", 3, method)
        assert toy.trees_equal(outcome.params, expected.params)
        assert outcome.steps == expected.steps
        for key in ("attack_auc", "scores"):
            assert [r[key] for r in again] == [r[key] for r in records]
        if not is_killed:
            break
    assert num_saves > 3 and not is_killed


def test_finished_request_is_repeated_only_for_another_original(
    problem, tmp_path, run, solved
):
    def num_run(problem):
        solved.clear()
        run(tmp_path, 2, "ccu", problem)
        return len(solved) // 2

    assert num_run(problem) == 2 and num_run(problem) == 0
    original = problem.executor.replicate(problem.model.init(jax.random.key(8)))
    assert num_run(problem._replace(params=original, store=None)) == 2


def test_diverging_request_is_the_last(problem, tmp_path, run):
    config = toy.make_config(finetune={"learning_rate": 1e30})
    outcome, records = run(tmp_path, 3, "finetune", problem._replace(config=config))
    assert len(records) < 3 and records[-1]["diverged"]
    assert outcome.diverged.startswith(f"request {len(records)}: ")
