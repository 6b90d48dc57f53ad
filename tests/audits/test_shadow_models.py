"""Shadow models: what they are trained on, joint training, and resuming."""

import functools

import jax
import numpy as np
import pytest

from ccu_jax import errors
from ccu_jax.audits import shadow_models
from ccu_jax.distributed import executors, preemption
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.methods.reference import make_shadow_program
from tests import toy


class Setup:
    """The problem and the plan of four shadow models."""

    def __init__(self, make_run, executor="vmap"):
        data = toy.make_dataset(140, per_group=2)
        self.problem = toy.make_problem(EXECUTORS[executor](), data)
        self.ctx, self.warnings = make_run(self.problem, data)
        sets, seed = self.problem.sets, self.problem.seed
        self.plan = shadow_models.plan_shadows(data, sets, 4, seed, "forget")
        self.progress = []

    def train(self, folder, batch_size):
        options = folder, batch_size, lambda *x: self.progress.append(x)
        return shadow_models.train_shadows(self.ctx, self.problem, self.plan, *options)


@pytest.fixture
def make_setup(make_run):
    return functools.partial(Setup, make_run)


def are_equal(one, other, tolerance=0.0):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def test_a_pair_splits_the_rows_but_no_group(make_setup):
    setup = make_setup()
    data, sets, plan = setup.ctx.data, setup.problem.sets, setup.plan
    assert set(plan.rows) == {*sets.unlearn, *sets.unseen}
    assert plan.num_shadows == 4
    np.testing.assert_array_equal(plan.is_in[::2], ~plan.is_in[1::2])
    assert abs(plan.is_in[0].mean() - 0.5) < 0.1
    group = data.group[plan.rows]
    same_group = group[:, None] == group
    np.testing.assert_array_equal(plan.group[:, None] == plan.group, same_group)
    same_half = plan.is_in[:, :, None] == plan.is_in[:, None]
    assert same_half[:, same_group].all()
    other = shadow_models.plan_shadows(data, sets, 4, 1, "forget")
    assert (other.is_in != plan.is_in).any()


def test_a_shadow_model_is_trained_on_its_half_and_on_all_texts(make_setup):
    setup = make_setup()
    problem, plan = setup.problem, setup.plan
    sets, seeds = problem.sets, set()
    for number, is_in in enumerate(plan.is_in):
        shadow = shadow_models.make_shadow_problem(problem, number)
        seeds.add(shadow.seed)
        program = make_shadow_program(shadow, plan.rows[is_in])
        rows, visual = set(program.plan["rows"].ravel()), program.table["visual"]
        assert rows == {*sets.retain, *sets.unlearn, *plan.rows[is_in]}
        images = {row for row in rows if visual[row]}
        assert images == {*sets.retain, *plan.rows[is_in]}
        unlearned = shadow_models.make_shadow_sets(problem, plan, number)
        assert set(unlearned.unlearn) == set(plan.rows[is_in])
        assert not set(unlearned.unseen) & images
    assert len(seeds) == plan.num_shadows


@pytest.mark.parametrize("executor", ["pmap", "vmap"])
def test_joint_training_equals_single_training(make_setup, tmp_path, executor):
    setup = make_setup(executor)
    forward, table = setup.problem.forward, setup.problem.table
    rows = np.arange(len(setup.ctx.data.id))

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


def test_damaged_and_foreign_models_are_retrained(make_setup, tmp_path, monkeypatch):
    setup = make_setup()
    first = setup.train(tmp_path, 1)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    seeds, loop, run = [], setup.ctx.loop, setup.ctx.loop.run
    monkeypatch.setattr(loop, "run", lambda *x: seeds.append(x[2].seed) or run(*x))
    assert are_equal(setup.train(tmp_path, 1), first)
    damaged = shadow_models.make_shadow_problem(setup.problem, 2)
    assert seeds == [damaged.seed] and setup.warnings
    setup.plan = setup.plan._replace(is_in=~setup.plan.is_in)
    setup.train(tmp_path, 1)
    assert len(seeds) == 5
