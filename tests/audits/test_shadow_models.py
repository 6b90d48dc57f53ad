"""Shadow models: what they are trained on, joint training, and resuming."""

import jax
import numpy as np
import pytest

from ccu_jax import errors
from ccu_jax.audits import shadow_models
from ccu_jax.audits.shadow_models import (
    plan_shadows,
    shadow_problem,
    shadow_sets,
    train_shadows,
)
from ccu_jax.distributed import executors, preemption
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.methods.reference import train_shadow
from tests import toy


@pytest.fixture
def data():
    return toy.make_dataset(140, per_group=2)


@pytest.fixture
def make_setup(data, make_run):
    """Makes context, problem and plan of four shadow models, and the warnings."""

    def make(executor="vmap"):
        problem = toy.make_problem(EXECUTORS[executor](), data)
        ctx, warnings = make_run(problem, data)
        plan = plan_shadows(data, problem.sets, 4, problem.seed, "forget")
        return ctx, problem, plan, warnings

    return make


def are_equal(one, other, tolerance=0.0):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def test_a_pair_shares_the_rows_and_groups_stay_whole(data, make_setup):
    _, problem, plan, _ = make_setup()
    assert set(plan.rows) == {*problem.sets.unlearn, *problem.sets.unseen}
    assert plan.num_shadows == 4
    np.testing.assert_array_equal(plan.is_in[::2], ~plan.is_in[1::2])
    assert abs(plan.is_in[0].mean() - 0.5) < 0.1
    group = data.group[plan.rows]
    same_group = group[:, None] == group
    np.testing.assert_array_equal(plan.group[:, None] == plan.group, same_group)
    same_half = plan.is_in[:, :, None] == plan.is_in[:, None]
    assert same_half[:, same_group].all()
    other = plan_shadows(data, problem.sets, 4, 1, "forget")
    assert (other.is_in != plan.is_in).any()


def test_a_shadow_model_is_trained_on_its_half_and_on_all_texts(make_setup):
    _, problem, plan, _ = make_setup()
    sets, seeds = problem.sets, set()
    for number, is_in in enumerate(plan.is_in):
        own = shadow_problem(problem, number)
        seeds.add(own.seed)
        program = train_shadow(own, plan.rows[is_in])
        rows, visual = set(program.plan["rows"].ravel()), program.table["visual"]
        assert rows == {*sets.retain, *sets.unlearn, *plan.rows[is_in]}
        images = {row for row in rows if visual[row]}
        assert images == {*sets.retain, *plan.rows[is_in]}
        own_sets = shadow_sets(problem, plan, number)
        assert set(own_sets.unlearn) == set(plan.rows[is_in])
        assert not set(own_sets.unseen) & images
    assert len(seeds) == plan.num_shadows


@pytest.mark.parametrize("executor", ["pmap", "vmap"])
def test_joint_training_equals_single_training(data, make_setup, tmp_path, executor):
    ctx, problem, plan, _ = make_setup(executor)
    progress, rows = [], np.arange(len(data.id))

    def outputs(size):
        # Some parameters have no effect on the outputs, and noise for a gradient.
        models = train_shadows(
            ctx,
            problem,
            plan,
            tmp_path / str(size),
            size,
            lambda *x: progress.append(x),
        )
        return [problem.forward.outputs(x, problem.table, rows) for x in models]

    single, joint = outputs(1), outputs(2)
    assert progress[0] == (0, 4) and progress[4] == progress[-1] == (4, 4)
    assert are_equal(single, joint, 2e-5)
    assert not are_equal(single[0], single[1], 1e-2)


def test_joint_training_resumes_after_preemption(make_setup, tmp_path, monkeypatch):
    ctx, problem, plan, _ = make_setup("pmap")
    monkeypatch.setattr(shadow_models, "_CALL_STEPS", 2)

    def train(folder):
        return train_shadows(ctx, problem, plan, folder, 4, lambda *x: None)

    expected, folder = train(tmp_path / "undisturbed"), tmp_path / "preempted"
    calls = []

    def should_stop():
        calls.append(preemption._State.is_checkpointing)
        return sum(calls) == 2  # after the second call of the compiled program

    monkeypatch.setattr(preemption, "should_stop", should_stop)
    with pytest.raises(errors.Preempted):
        train(folder)
    assert [path.name for path in folder.iterdir()] == ["0-1-2-3-steps"]
    monkeypatch.setattr(preemption, "should_stop", lambda: False)
    assert are_equal(train(folder), expected)
    assert sorted(path.name for path in folder.iterdir()) == list("0123")


def test_the_batch_is_halved_until_it_fits_in_memory(make_setup, tmp_path, monkeypatch):
    ctx, problem, plan, _ = make_setup("pmap")
    sizes, progress = [], []

    def fits(size):
        sizes.append(size)
        return len(sizes) > 1  # not four models, but two

    monkeypatch.setattr(executors, "fits", fits)
    models = train_shadows(
        ctx, problem, plan, tmp_path, 4, lambda done, total: progress.append(done)
    )
    assert len(models) == 4 and progress == [0, 2, 4]
    assert 1.5 < sizes[0] / sizes[1] < 2.5


def test_only_damaged_or_foreign_checkpoints_are_trained_again(
    make_setup, tmp_path, monkeypatch
):
    ctx, problem, plan, warnings = make_setup()

    def train(plan):
        return train_shadows(ctx, problem, plan, tmp_path, 1, lambda *x: None)

    first = train(plan)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    seeds, run = [], ctx.loop.run
    monkeypatch.setattr(
        ctx.loop, "run", lambda *args: seeds.append(args[2].seed) or run(*args)
    )
    assert are_equal(train(plan), first)
    assert seeds == [shadow_problem(problem, 2).seed] and warnings
    train(plan._replace(is_in=~plan.is_in))
    assert len(seeds) == 5
