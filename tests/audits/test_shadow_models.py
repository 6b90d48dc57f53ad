"""The pool of shadow models, and models that are taught again what they forgot."""

import types

import jax
import numpy as np
import pytest

from ccu_jax import errors
from ccu_jax.audits import relearning
from ccu_jax.audits import shadow_models as shadows
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed import preemption
from ccu_jax.methods import METHODS
from ccu_jax.runs.progress import NullStage
from tests import toy
from tests.toy import make_loop

EXECUTORS = ("pmap", "vmap")


@pytest.fixture
def data():
    return toy.make_dataset(140, per_group=2)


@pytest.fixture
def reporter():
    """What complains of damaged checkpoints: as it would be told."""
    told = []
    return types.SimpleNamespace(warn=told.append, told=told)


def bench_of(data, problem, reporter):
    return types.SimpleNamespace(
        data=data,
        config=problem.config,
        model=problem.model,
        executor=problem.executor,
        loop=make_loop(problem),
        reporter=reporter,
    )


def plan_of(data, problem, count=4):
    return shadows.plan_shadows(data, problem.sets, count, problem.seed, "forget")


def same(one, other, tolerance=0.0):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def test_each_pair_shares_the_rows_and_keeps_groups_whole(data):
    problem = toy.make_problem(parallel.EXECUTORS["vmap"](), data)
    plan = plan_of(data, problem, 6)
    asked = {*problem.sets.unlearn, *problem.sets.unseen}
    assert set(plan.rows) == asked and plan.num_shadows == 6
    np.testing.assert_array_equal(plan.is_in[::2], ~plan.is_in[1::2])
    assert abs(plan.is_in.mean() - 0.5) < 1e-9
    assert abs(plan.is_in[0].mean() - 0.5) < 0.1
    for shown in plan.is_in:
        for group in np.unique(data.group[plan.rows]):
            assert len(set(shown[data.group[plan.rows] == group])) == 1
    same_group = data.group[plan.rows][:, None] == data.group[plan.rows]
    np.testing.assert_array_equal(plan.group[:, None] == plan.group, same_group)
    other = shadows.plan_shadows(data, problem.sets, 6, 1, "forget")
    assert (other.is_in != plan.is_in).any()


def test_a_shadow_learns_what_it_is_shown_and_the_texts_that_may_be_known(data):
    problem = toy.make_problem(parallel.EXECUTORS["vmap"](), data)
    plan, sets = plan_of(data, problem), problem.sets
    for number, shown in enumerate(plan.is_in):
        given = shadows.shadow_problem(problem, number)
        program = shadows.reference.train_shadow(given, plan.rows[shown])
        rows, visual = set(program.plan["rows"].ravel()), program.table["visual"]
        assert rows == {*sets.retain, *sets.unlearn, *plan.rows[shown]}
        seen = {row for row in rows if visual[row]}
        assert seen == {*sets.retain, *plan.rows[shown]}
        forgotten = shadows.shadow_sets(problem, plan, number)
        assert set(forgotten.unlearn) == set(plan.rows[shown])
        assert not set(forgotten.unseen) & seen


@pytest.mark.parametrize("name", EXECUTORS)
def test_shadows_trained_together_are_those_trained_one_by_one(
    data, reporter, tmp_path, name
):
    executor = parallel.EXECUTORS[name]()
    problem = toy.make_problem(executor, data)
    bench, plan = bench_of(data, problem, reporter), plan_of(data, problem)
    told = []
    alone, together = (
        shadows.train_shadows(
            bench, problem, plan, tmp_path / str(n), n, lambda *x: told.append(x)
        )
        for n in (1, 2)
    )
    assert told[0] == (0, 4) and told[4] == (4, 4) == told[-1]
    # What they say: some parameters have no effect, and noise for a gradient.
    every = np.arange(len(data.id))
    alone, together = (
        [problem.forward.outputs(params, problem.table, every) for params in pool]
        for pool in (alone, together)
    )
    assert same(alone, together, 2e-5)
    assert not same(alone[0], alone[1], 1e-2)
    # As they are trained, no two share their chance.
    assert len({shadows.shadow_problem(problem, n).seed for n in range(4)}) == 4


def test_shadows_together_leave_when_told_to_and_go_on(
    data, reporter, tmp_path, monkeypatch
):
    problem = toy.make_problem(parallel.EXECUTORS["pmap"](), data)
    bench, plan = bench_of(data, problem, reporter), plan_of(data, problem)
    monkeypatch.setattr(shadows, "_CALL_STEPS", 2)
    given = bench, problem, plan

    def train(folder):
        return shadows.train_shadows(*given, tmp_path / folder, 4, lambda *told: None)

    expected = train("undisturbed")
    asked = iter([False, True])  # after two calls
    monkeypatch.setattr(preemption, "should_stop", lambda: next(asked))
    with pytest.raises(errors.Preempted):
        train("left")
    assert [p.name for p in (tmp_path / "left").iterdir()] == ["0-1-2-3-steps"]
    monkeypatch.setattr(preemption, "should_stop", lambda: False)
    found = train("left")
    assert same(found, expected)
    assert sorted(p.name for p in (tmp_path / "left").iterdir()) == list("0123")


def test_no_more_shadows_are_trained_together_than_memory_holds(
    data, reporter, tmp_path, monkeypatch
):
    problem = toy.make_problem(parallel.EXECUTORS["pmap"](), data)
    bench, plan = bench_of(data, problem, reporter), plan_of(data, problem)
    asked = []

    def fits(size):
        asked.append(size)
        return len(asked) > 1  # not four, but two

    monkeypatch.setattr(parallel, "fits", fits)
    told = []
    found = shadows.train_shadows(
        bench, problem, plan, tmp_path, 4, lambda done, of: told.append(done)
    )
    assert len(found) == 4 and told == [0, 2, 4]
    assert 1.5 < asked[0] / asked[1] < 2.5


def test_only_what_is_missing_damaged_or_others_is_trained_again(
    data, reporter, tmp_path, monkeypatch
):
    problem = toy.make_problem(parallel.EXECUTORS["vmap"](), data)
    bench, plan = bench_of(data, problem, reporter), plan_of(data, problem)
    first = shadows.train_shadows(bench, problem, plan, tmp_path, 1, lambda *x: None)
    for file in (tmp_path / "2").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(bytes(255 - b for b in file.read_bytes()))
    runs, run = [], bench.loop.run
    bench.loop = types.SimpleNamespace(
        run=lambda *given: runs.append(given[2].seed) or run(*given)
    )
    again = shadows.train_shadows(bench, problem, plan, tmp_path, 1, lambda *x: None)
    assert runs == [shadows.shadow_problem(problem, 2).seed] and same(first, again)
    assert any("unusable" in text for text in reporter.told)
    # A pool that was shown other rows is another pool.
    other = plan._replace(is_in=~plan.is_in)
    shadows.train_shadows(bench, problem, other, tmp_path, 1, lambda *x: None)
    assert len(runs) == 5


# --- relearning -----------------------------------------------------------------------


def test_who_knows_the_pictures_has_nothing_to_learn_and_who_does_not_needs_steps(
    data, reporter, tmp_path
):
    settings = toy.make_config(train={**toy.NO_AUGMENTATION, "epochs": 30})
    data = toy.make_memorizable_dataset(280)
    problem = toy.make_problem(parallel.EXECUTORS["vmap"](), data, settings)
    bench = bench_of(data, problem, reporter)
    trained = bench.loop.run(
        "original", METHODS["original"], problem, tmp_path / "o", NullStage()
    ).params
    problem = problem._replace(params=trained)
    fresh = problem.model.init(jax.random.key(99))
    folder = tmp_path / "relearn"
    known, unknown, never, broken = (
        relearning.relearn(bench, given, params, folder, within)
        for given, params, within in (
            (problem, trained, 0.01),
            (problem, fresh, 0.01),
            (problem, fresh, -2.0),  # three times as right as the original
            (problem._replace(params=broken_of(trained)), trained, 0.01),
        )
    )
    assert known[:3] == (0, 0, 0)
    assert unknown.fewest is None or 3 < unknown.fewest <= (unknown.steps or 100)
    assert never[:3] == (None, None, None) and never.most == relearning.MAX_STEPS
    assert broken.steps is None
    assert not folder.exists()


def broken_of(params):
    return jax.tree.map(lambda x: x * np.nan, params)


def test_relearning_goes_by_the_score_of_several_labels_too(reporter, tmp_path):
    data = toy.make_dataset(140, multi_label=True)
    problem = toy.make_problem(parallel.EXECUTORS["pmap"](), data)
    bench = bench_of(data, problem, reporter)
    params = problem.model.init(jax.random.key(1))
    problem = problem._replace(params=params)
    folder = tmp_path / "relearn"
    assert relearning.relearn(bench, problem, params, folder).steps == 0
