"""Requests one after another: cut in order, handled on what came before, resumable."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest

from ccu_jax.distributed import executors as parallel
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate import predictions
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL
from ccu_jax.runs import requests, stages
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets import splits as unlearn_set
from tests import toy

ROWS = 112
ATTACKS = ("image", "text", "fused", "pair")


class Quiet:
    """A stage that keeps what it is told."""

    def __init__(self):
        self.told = []

    def update(self, *args, **kwargs):
        pass

    def report_progress(self, what, done, total):
        self.told.append(what)


def bench_of(problem, data, workdir, count, loop=None):
    settings = problem.config
    unlearn = dataclasses.replace(settings.unlearn, num_requests=count)
    return types.SimpleNamespace(
        config=dataclasses.replace(settings, unlearn=unlearn),
        workdir=workdir,
        reporter=types.SimpleNamespace(warn=pytest.fail, log=print),
        executor=problem.executor,
        data=data,
        model=problem.model,
        forward=problem.forward,
        loop=loop or Loop(settings.run, problem.executor, pytest.fail),
        table=problem.table,
    )


@pytest.fixture(scope="module")
def data():
    return toy.make_dataset(ROWS)


@pytest.fixture(scope="module")
def problem(data, tmp_path_factory):
    """A problem with the store of its original."""
    # Killed after each of them below, a run shall have few checkpoints.
    settings = toy.make_config(run={"checkpoint_steps": 2}, finetune={"epochs": 1.0})
    made = toy.make_problem(parallel.vmap(2), data, settings, rule="random:0.3")
    folder = tmp_path_factory.mktemp("store") / "features"
    store = features.open_or_build(
        folder,
        made.forward,
        made.params,
        made.table,
        made.seed,
        "toy",
        lambda *told: None,
    )
    return made._replace(store=store)


@pytest.fixture(scope="module")
def loop(problem):
    return Loop(problem.config.run, problem.executor, pytest.fail)


# --- cutting --------------------------------------------------------------------------


def cut(data, sets, count, seed=0):
    unlearn = types.SimpleNamespace(num_requests=count, duplicates="forget")
    config = types.SimpleNamespace(unlearn=unlearn)
    return requests.split_requests(
        types.SimpleNamespace(data=data, config=config), seed, sets
    )


@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_requests_are_the_unlearn_set_in_the_order_of_forgetting(count, per_group):
    data = toy.make_dataset(700, per_group=per_group)
    sets = unlearn_set.draw_sets(data, "random:0.2", 3, 0.2)
    parts = cut(data, sets, count, seed=3)
    assert len(parts) == count
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), sets.unlearn)
    groups = [set(data.group[rows].tolist()) for rows in parts]
    place = {group: n for n, group in enumerate(unlearn_set.forgetting_order(data, 3))}
    for before, after in zip(groups, groups[1:], strict=False):
        assert max(map(place.get, before)) < min(map(place.get, after))
    pictures = [data.has_image[rows].sum() for rows in parts]
    assert max(pictures) - min(pictures) <= 2 * per_group
    # As they stand in the file of the unlearn set.
    text = unlearn_set.format_unlearn_set(data, sets, 3, "random:0.2")
    ids = [line for line in text.splitlines() if not line.startswith("# ")]
    start = 0
    for rows in parts:
        assert set(ids[start : start + len(rows)]) == set(data.id[rows])
        start += len(rows)


def test_every_request_has_a_picture_whatever_the_groups_are_like():
    data = toy.make_dataset(700, per_group=4)
    draw = np.random.default_rng(0)
    for seed in range(20):
        some = data._replace(has_image=draw.random(700) < 0.15)
        sets = unlearn_set.draw_sets(some, "random:0.1", seed, 0.2)
        groups = unlearn_set.groups_in_order(some, sets, seed)
        shown = sum(some.has_image[rows].any() for rows in groups)
        parts = cut(some, sets, shown, seed)
        assert all(some.has_image[rows].any() for rows in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), sets.unlearn)
        with pytest.raises(UserError, match=f"{shown} groups with pictures"):
            cut(some, sets, shown + 1, seed)


def test_one_large_group_leaves_something_to_every_request():
    data = toy.make_dataset(700)
    large = np.arange(700) < 300
    data = data._replace(group=np.where(large, "large", data.group))
    data = data._replace(split=np.where(large, "train", data.split))
    for seed in range(10):
        sets = unlearn_set.draw_sets(data, "random:0.99", seed, 0.1)
        if "large" in data.group[sets.unlearn]:
            assert all(len(rows) for rows in cut(data, sets, 9, seed))


# --- handling -------------------------------------------------------------------------


class Watched(dict):
    """Methods that keep what they were given."""

    def __init__(self):
        super().__init__(METHODS)
        self.given = []

    def __getitem__(self, name):
        method = super().__getitem__(name)

        def watched(problem):
            self.given.append(problem)
            return method(problem)

        return watched


@pytest.mark.parametrize("method", ["ccu", "finetune"])
def test_each_request_starts_from_what_the_one_before_left(
    problem, data, loop, tmp_path, monkeypatch, method
):
    methods = Watched()
    monkeypatch.setattr(requests, "METHODS", methods)
    bench, stage = bench_of(problem, data, tmp_path, 3, loop), Quiet()
    outcome, told = requests.run_requests(
        bench, problem, method, tmp_path / "steps", stage
    )
    assert stage.told == ["request 1/3", "request 2/3", "request 3/3"]
    parts = requests.split_requests(bench, 0, problem.sets)
    given = methods.given[::2]  # a program is started twice
    assert len(given) == len(told) == 3
    for number, one in enumerate(given):
        np.testing.assert_array_equal(one.sets.unlearn, parts[number])
        later = np.concatenate([problem.sets.retain, *parts[number + 1 :]])
        np.testing.assert_array_equal(one.sets.retain, np.sort(later))
        for name in ("unseen", "validation", "test"):
            before = getattr(problem.sets, name)
            np.testing.assert_array_equal(getattr(one.sets, name), before)
        # The store tells what the original's trunk says, and only that.
        assert (one.store is None) == (method == "finetune" and number > 0)
    assert len({one.seed for one in given}) == 3 and given[0].seed == problem.seed
    same(given[0].params, problem.params)
    for number, one in enumerate(given[1:], 1):
        left = tmp_path / "steps" / f"request-{number}" / "params"
        same(one.params, checkpoint.restore(left, problem.params, pytest.fail).tree)
    heads = [np.asarray(jax.tree.leaves(one.params["image_head"])[0]) for one in given]
    assert not (heads[0] == heads[1]).all() and not (heads[1] == heads[2]).all()
    _assert_told(data, problem, parts, outcome, told, method)


def test_what_is_stored_goes_on_with_the_model(problem, data, loop, tmp_path):
    """As if it were computed from the pictures by the model as it is."""
    rows = np.arange(0, ROWS, 3)
    outcome = loop.run("ccu", METHODS["ccu"], problem, tmp_path, Quiet())
    params = {**problem.params, **outcome.params}
    fresh = features.init_untrained(problem.model, problem.seed)
    computed = features.compute_features(
        problem.forward, params, fresh, problem.table, rows
    )
    of = problem.store, problem.forward, params, problem.table
    found = requests.UpdatedStore(*of).take(rows)
    assert found.keys() == computed.keys()
    for name, column in found.items():
        np.testing.assert_allclose(column, computed[name], atol=1e-5, err_msg=name)
    before = problem.store.take(rows)
    assert np.abs(before["original_image"] - found["original_image"]).max() > 0.01
    assert before["original_text"].tobytes() == found["original_text"].tobytes()


def _assert_told(data, problem, parts, outcome, told, method):
    """What is told of requests is what their model says, and all together its sum."""
    assert (set(outcome.params) <= set(TAIL)) == (method == "ccu")
    assert outcome.steps == sum(request["steps"] for request in told)
    for name in ("start", "steps", "compile"):
        every = [request["seconds"][name] for request in told]
        assert outcome.seconds[name] == sum(every)
    for request, rows in zip(told, parts, strict=True):
        seconds = request["seconds"]
        assert seconds["unlearn"] == seconds["start"] + seconds["steps"] > 0
        assert request["count"] == len(rows)
        assert request["pictures"] == data.has_image[rows].sum()
        assert set(request["attack_auc"]) == {"all", "first", "this"}
        assert set(request["scores"]) == {"test"}
    params = {**problem.params, **outcome.params}
    found = predictions.predict_all_splits(
        problem.forward, params, problem.table, data, problem.sets
    )
    last = told[-1]["attack_auc"]
    attacks = predictions.attack_auc(found)
    for view in ATTACKS:
        assert last["all"][view] == pytest.approx(attacks[view])
    for of, rows in (("first", parts[0]), ("this", parts[2])):
        sets = problem.sets._replace(unlearn=rows)
        found = predictions.predict_all_splits(
            problem.forward, params, problem.table, data, sets
        )
        attacks = predictions.attack_auc(found)
        for view in ATTACKS:
            assert last[of][view] == pytest.approx(attacks[view])
    scores = predictions.compute_scores(found)["test"]
    for view, expected in told[-1]["scores"]["test"].items():
        assert expected == pytest.approx(scores[view])
    assert told[0]["attack_auc"]["all"] == told[0]["attack_auc"]["first"]


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ccu", "finetune"])
def test_a_run_killed_at_any_request_ends_with_the_same_bits(
    problem, data, loop, tmp_path, monkeypatch, method
):
    def run(workdir):
        bench = bench_of(problem, data, workdir, 3, loop)
        return requests.run_requests(bench, problem, method, workdir / "steps", Quiet())

    undisturbed, told = run(tmp_path / "whole")
    save, left = requests.checkpoint.save, [0]

    def killed(folder, *args, **kwargs):
        """In the middle of steps, before parameters are kept, and after."""
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        save(folder, *args, **kwargs)
        if left[0] == 0 and folder.name == "params":
            raise Killed

    monkeypatch.setattr("ccu_jax.train.checkpoint.save", killed)
    kills = 0
    for saves in range(1, 30):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        left[0] = saves
        with pytest.raises(Killed):
            run(tmp_path / "run")
            raise Killed
        done = left[0] > 0
        left[0] = 99
        outcome, again = run(tmp_path / "run")
        same(outcome.params, undisturbed.params)
        assert outcome.steps == undisturbed.steps
        assert [r["attack_auc"] for r in again] == [r["attack_auc"] for r in told]
        assert [r["scores"] for r in again] == [r["scores"] for r in told]
        if done:
            break
        kills += 1
    assert kills >= 3


def test_a_request_that_is_done_is_not_done_again_nor_after_another_original(
    problem, data, loop, tmp_path, monkeypatch
):
    methods = Watched()
    monkeypatch.setattr(requests, "METHODS", methods)

    def run(given):
        methods.given.clear()
        bench = bench_of(given, data, tmp_path, 2, loop)
        requests.run_requests(bench, given, "ccu", tmp_path / "steps", Quiet())
        return len(methods.given) // 2

    assert run(problem) == 2 and run(problem) == 0
    other = problem.executor.replicate(problem.model.init(jax.random.key(8)))
    assert run(problem._replace(params=other, store=None)) == 2


def test_a_request_that_diverges_is_the_last(problem, data, tmp_path):
    config = toy.make_config(finetune={"learning_rate": 1e30})
    bad = problem._replace(config=config)
    bench = bench_of(bad, data, tmp_path, 3)
    outcome, told = requests.run_requests(
        bench, bad, "finetune", tmp_path / "steps", Quiet()
    )
    assert len(told) < 3 and outcome.diverged.startswith(f"request {len(told)}: ")
    assert told[-1]["diverged"]


def test_a_lone_request_is_the_method_as_it_was(problem, data, loop, tmp_path):
    bench = bench_of(problem, data, tmp_path, 1, loop)
    outcome, told = stages._run_method(
        bench, problem, "ccu", tmp_path / "steps", Quiet()
    )
    alone = bench.loop.run("ccu", METHODS["ccu"], problem, tmp_path / "a", Quiet())
    same(outcome.params, alone.params)
    assert told == []
    # Neither are references, whatever is asked of the others.
    bench = bench_of(problem, data, tmp_path, 2, loop)
    given = problem._replace(params=None, store=None)
    folder = tmp_path / "retrain"
    assert stages._run_method(bench, given, "retrain", folder, Quiet())[1] == []
    assert not list(folder.glob("request*"))
