"""Shadow models: what they are trained on, joint training, and resuming."""

import types

import jax
import numpy as np
import pytest

from ccu_jax import errors
from ccu_jax.audits import shadow_models
from ccu_jax.audits.shadow_models import (
    make_shadow_problem,
    make_shadow_sets,
    plan_shadows,
    train_shadows,
)
from ccu_jax.distributed import executors, preemption
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.methods.reference import make_shadow_program
from tests import toy


@pytest.fixture
def data():
    return toy.make_dataset(140, per_group=2)


@pytest.fixture
def make_setup(data, make_run):
    """Makes the problem and the plan of four shadow models, and trains them."""

    def make(executor="vmap"):
        problem = toy.make_problem(EXECUTORS[executor](), data)
        ctx, warnings = make_run(problem, data)
        plan = plan_shadows(data, problem.sets, 4, problem.seed, "forget")
        progress = []

        def train(folder, batch_size, plan=plan):
            return train_shadows(
                ctx, problem, plan, folder, batch_size, lambda *x: progress.append(x)
            )

        return types.SimpleNamespace(
            ctx=ctx,
            problem=problem,
            plan=plan,
            warnings=warnings,
            progress=progress,
            train=train,
        )

    return make


def are_equal(one, other, tolerance=0.0):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def test_a_pair_shares_the_rows_and_groups_stay_whole(data, make_setup):
    setup = make_setup()
    sets, plan = setup.problem.sets, setup.plan
    assert set(plan.rows) == {*sets.unlearn, *sets.unseen}
    assert plan.num_shadows == 4
    np.testing.assert_array_equal(plan.is_in[::2], ~plan.is_in[1::2])
    assert abs(plan.is_in[0].mean() - 0.5) < 0.1
    group = data.group[plan.rows]
    same_group = group[:, None] == group
    np.testing.assert_array_equal(plan.group[:, None] == plan.group, same_group)
    same_half = plan.is_in[:, :, None] == plan.is_in[:, None]
    assert same_half[:, same_group].all()
    assert (plan_shadows(data, sets, 4, 1, "forget").is_in != plan.is_in).any()


def test_a_shadow_model_is_trained_on_its_half_and_on_all_texts(make_setup):
    setup = make_setup()
    problem, plan = setup.problem, setup.plan
    sets, seeds = problem.sets, set()
    for number, is_in in enumerate(plan.is_in):
        shadow = make_shadow_problem(problem, number)
        seeds.add(shadow.seed)
        program = make_shadow_program(shadow, plan.rows[is_in])
        rows, visual = set(program.plan["rows"].ravel()), program.table["visual"]
        assert rows == {*sets.retain, *sets.unlearn, *plan.rows[is_in]}
        images = {row for row in rows if visual[row]}
        assert images == {*sets.retain, *plan.rows[is_in]}
        unlearned = make_shadow_sets(problem, plan, number)
        assert set(unlearned.unlearn) == set(plan.rows[is_in])
        assert not set(unlearned.unseen) & images
    assert len(seeds) == plan.num_shadows


@pytest.mark.parametrize("executor", ["pmap", "vmap"])
def test_joint_training_equals_single_training(data, make_setup, tmp_path, executor):
    setup, rows = make_setup(executor), np.arange(len(data.id))
    forward, table = setup.problem.forward, setup.problem.table

    def outputs(size):
        # Some parameters have no effect on the outputs, and noise for a gradient.
        models = setup.train(tmp_path / str(size), size)
        return [forward.compute_outputs(params, table, rows) for params in models]

    single, joint = outputs(1), outputs(2)
    progress = setup.progress
    assert progress[0] == (0, 4) and progress[4] == progress[-1] == (4, 4)
    assert are_equal(single, joint, 2e-5)
    assert not are_equal(single[0], single[1], 1e-2)


def test_joint_training_resumes_after_preemption(make_setup, tmp_path, monkeypatch):
    setup = make_setup("pmap")
    monkeypatch.setattr(shadow_models, "_CALL_STEPS", 2)
    expected, folder = setup.train(tmp_path / "undisturbed", 4), tmp_path / "preempted"
    calls = []

    def should_stop():
        calls.append(preemption._State.is_exit_deferred)
        return sum(calls) == 2  # after the second call of the compiled program

    monkeypatch.setattr(preemption, "should_stop", should_stop)
    with pytest.raises(errors.Preempted):
        setup.train(folder, 4)
    assert [path.name for path in folder.iterdir()] == ["0-1-2-3-steps"]
    monkeypatch.setattr(preemption, "should_stop", lambda: False)
    assert are_equal(setup.train(folder, 4), expected)
    assert sorted(path.name for path in folder.iterdir()) == list("0123")


def test_the_batch_is_halved_until_it_fits_in_memory(make_setup, tmp_path, monkeypatch):
    setup, sizes = make_setup("pmap"), []

    def fits(size):
        sizes.append(size)
        return len(sizes) > 1  # not four models, but two

    monkeypatch.setattr(executors, "fits_on_devices", fits)
    assert len(setup.train(tmp_path, 4)) == 4
    assert [done for done, _ in setup.progress] == [0, 2, 4]
    assert 1.5 < sizes[0] / sizes[1] < 2.5


def test_only_damaged_or_foreign_checkpoints_are_trained_again(
    make_setup, tmp_path, monkeypatch
):
    setup = make_setup()
    first = setup.train(tmp_path, 1)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    seeds, run = [], setup.ctx.loop.run
    monkeypatch.setattr(
        setup.ctx.loop, "run", lambda *args: seeds.append(args[2].seed) or run(*args)
    )
    assert are_equal(setup.train(tmp_path, 1), first)
    assert seeds == [make_shadow_problem(setup.problem, 2).seed] and setup.warnings
    setup.train(tmp_path, 1, setup.plan._replace(is_in=~setup.plan.is_in))
    assert len(seeds) == 5
