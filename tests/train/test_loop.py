"""The loop resumes, stops, diverges and compiles as documented."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax import errors
from ccu_jax.config.schema import Run
from ccu_jax.distributed import executors, preemption
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.distributed.executors import AXIS
from ccu_jax.train import loop as loop_module
from ccu_jax.train.program import Program
from ccu_jax.train.step import send_batches
from tests import toy
from tests.toy import NullStage, make_loop, trees_equal

TABLE = {"x": np.linspace(0, 1, 20, dtype=np.float32)}


def walk(problem, steps=7, fail_at=None, stop_after=None, table=TABLE, batch=4):
    """Returns a program with cheap steps: gradient descent of one parameter."""

    def loss(params, frozen, aux, batch, step):
        target = jax.vmap(jax.random.uniform)(batch["rows"]["key"])
        error = batch["rows"]["x"] * params["w"] - target
        total = jax.lax.pmean((error**2).mean(), AXIS)
        if fail_at is not None:
            total = jnp.where(step == fail_at, jnp.nan, total)
        return total, {}

    return Program(
        params={"w": jnp.float32(3)},
        frozen=(),
        loss=loss,
        optimizer=optax.adam(0.1),
        table=table,
        plan={"rows": problem.plan_batches(np.arange(20), batch, steps, "rows")},
        aux=jnp.int32(-1),
        refresh=lambda params, frozen, aux, sharded_tables: aux + 1,
        stop=None if stop_after is None else lambda aux: aux >= stop_after,
    )


def sharded_walk(problem):
    program = walk(problem)
    rows = problem.executor.shard_tree(program.table)
    return program._replace(table={}, sharded_tables={"rows": rows})


@pytest.fixture
def solve(tmp_path, problem):
    """Runs a method in a new loop, or in one that is passed."""

    def solve(method, folder="none", stage=None, *, loop=None, problem=problem, **run):
        config: Any = {"steps_per_call": 2} | run
        loop = loop or make_loop(problem, Run(**config))
        stage = stage or NullStage()
        return loop.run("walk", method, problem, tmp_path / folder, stage)

    return solve


class CallAfter(NullStage):
    """A stage that calls a function as soon as so many steps are reported."""

    def __init__(self, steps, function):
        self.steps, self.function = steps, function

    def update(self, done, *args, **kwargs):
        if done >= self.steps:
            self.function()


class Killed(Exception):
    pass


@pytest.fixture(scope="module", params=[None, 3, 4])
def uninterrupted(request, tmp_path_factory, problem):
    """A walk that may stop itself, a loop that has compiled it, and its outcome."""
    method = functools.partial(walk, stop_after=request.param)
    loop = make_loop(problem, Run(steps_per_call=2, checkpoint_steps=2))
    folder = tmp_path_factory.mktemp("uninterrupted") / "steps"
    outcome = loop.run("walk", method, problem, folder, NullStage())
    assert outcome.steps in (request.param, 7)
    return method, loop, outcome


@pytest.mark.parametrize("after", range(1, 8))
def test_killed_run_resumes_and_ends_with_the_same_bits(uninterrupted, solve, after):
    method, loop, expected = uninterrupted
    stage = CallAfter(min(after, expected.steps), mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
        solve(method, "killed", stage, loop=loop)
    outcome = solve(method, "killed", loop=loop)
    assert trees_equal(outcome.params, expected.params)
    assert outcome.steps == expected.steps


def test_sharded_table_gives_the_same_bits_with_one_call_per_checkpoint(solve):
    expected = solve(walk)
    calls = []
    for every in (2, 3, 100):
        stage = NullStage()
        stage.update = lambda done, *args, **kwargs: calls.append(done)
        calls.clear()
        run = {"checkpoint_steps": every, "steps_per_call": 1}
        outcome = solve(sharded_walk, f"every-{every}", stage, **run)
        assert trees_equal(outcome.params, expected.params) and outcome.steps == 7
        # One call per checkpoint, whatever `steps_per_call` says.
        assert sorted(set(calls)) == [0, *range(every, 7, every), 7]


@pytest.fixture
def set_requested(monkeypatch):
    """Sets whether a SIGTERM was received."""
    return functools.partial(monkeypatch.setattr, preemption._State, "is_requested")


def test_preempted_run_saves_and_resumes_with_the_same_bits(
    solve, tmp_path, set_requested
):
    method = functools.partial(walk, steps=9)
    expected = solve(method, "uninterrupted")
    with pytest.raises(errors.Preempted):
        solve(method, "preempted", CallAfter(2, lambda: set_requested(True)))
    assert {p.name for p in (tmp_path / "preempted").iterdir()} == {"4"}
    set_requested(False)
    outcome = solve(method, "preempted")
    assert trees_equal(outcome.params, expected.params) and outcome.steps == 9


def test_signal_during_the_last_call_saves_the_last_step(
    solve, problem, tmp_path, monkeypatch, set_requested
):
    loop = make_loop(problem, Run(steps_per_call=100))
    method = functools.partial(walk, steps=9)
    expected = solve(method, "uninterrupted", loop=loop)
    wait = jax.block_until_ready

    def terminated(tree):
        set_requested(preemption._State.is_exit_deferred)
        return wait(tree)

    with monkeypatch.context() as patched:
        patched.setattr(jax, "block_until_ready", terminated)
        with pytest.raises(errors.Preempted):
            solve(method, "preempted", loop=loop)
    assert {p.name for p in (tmp_path / "preempted").iterdir()} == {"9"}
    set_requested(False)
    with mock.patch.object(loop_module, "send_batches", wraps=send_batches) as send:
        outcome = solve(method, "preempted", loop=loop)
    send.assert_called_once()  # only to compile: no step is left
    assert trees_equal(outcome.params, expected.params) and outcome.steps == 9


@pytest.mark.parametrize("fail_at, restored", [(0, 0), (1, 0), (3, 2), (6, 6)])
@pytest.mark.parametrize("every", [2, 100])
def test_diverged_run_restores_the_last_checkpoint(solve, fail_at, restored, every):
    restored = restored if every == 2 else 0
    method = functools.partial(walk, fail_at=fail_at)
    outcome = solve(method, "steps", checkpoint_steps=every)
    failure = f"step {fail_at}: loss nan; parameters of step {restored} restored"
    assert (outcome.diverged, outcome.steps) == (failure, fail_at)
    good = {"w": np.float32(3)}
    if restored:
        good = solve(functools.partial(walk, steps=restored)).params
    assert trees_equal(outcome.params, good)


def test_nonfinite_parameters_are_not_saved(solve):
    # Loss and gradient of step 3 are finite, the updated parameters are not.
    optimizer = optax.sgd(lambda step: jnp.where(step == 3, jnp.inf, 0.1))

    def method(problem):
        return walk(problem)._replace(optimizer=optimizer)

    outcome = solve(method, "steps", checkpoint_steps=2)
    assert outcome.diverged == (
        "step 3: parameters of w are not finite; parameters of step 2 restored"
    )
    assert np.isfinite(outcome.params["w"])


def test_nonfinite_results_are_reported(solve):
    params = {"w": np.float32(np.inf)}
    for method, steps in (
        (lambda problem: walk(problem)._replace(result=lambda *args: params), 7),
        (lambda problem: Program(params=params, frozen=(), loss=None), 0),
    ):
        outcome = solve(method)
        assert outcome.diverged == "parameters of w are not finite"
        assert outcome.steps == steps


def test_programs_with_other_refresh_intervals_share_an_executable(solve, problem):
    loop = make_loop(problem, Run(steps_per_call=2))
    traces = []

    def method(every, problem):
        def refresh(params, frozen, aux, sharded_tables):
            traces.append(every)
            return aux + 1

        # The result is not the last state, but the number of refreshes, minus 1.
        return walk(problem)._replace(
            refresh=refresh,
            refresh_every=every,
            result=lambda params, aux: {"w": 1.0 * aux},
        )

    for every, num_refreshes in ((1, 7), (3, 3), (2, 4), (1_000_000, 1)):
        outcome = solve(functools.partial(method, every), loop=loop)
        assert outcome.params["w"] == num_refreshes - 1, every
        assert outcome.steps == 7
    assert set(traces) == {1}, "only the first was traced"


def test_training_section_is_part_of_the_executable(solve, problem):
    shared = make_loop(problem, Run(steps_per_call=2))

    def method(problem):
        rate = problem.config.train.contrastive_weight
        return walk(problem)._replace(optimizer=optax.sgd(rate))

    def train(rate, loop=None):
        config = toy.make_config(train={"contrastive_weight": rate})
        return solve(method, loop=loop, problem=problem._replace(config=config)).params

    first, second = train(0.1, shared), train(0.01, shared)
    assert not trees_equal(first, second)
    assert trees_equal(second, train(0.01))


def test_methods_with_the_same_program_share_an_executable(
    tmp_path, problem, run_method
):
    loop = make_loop(problem)
    names = ("original", "retrain", "retrain_visual", "finetune")
    original = jax.stages.Lowered.compile
    with mock.patch.object(
        jax.stages.Lowered, "compile", autospec=True, side_effect=original
    ) as compile_:
        steps = [run_method(name, tmp_path, loop=loop)[0].steps for name in names]
    compile_.assert_called_once()
    assert steps[1] < steps[0]  # another length, other rows


@pytest.mark.parametrize("name", executors.EXECUTORS)
def test_no_implicit_copies_during_the_steps(name, solve, problem):
    executor = executors.EXECUTORS[name]()
    problem = problem._replace(executor=executor)
    stored = np.linspace(0, 1, 24, dtype=np.float32)
    shards = stored.reshape(executor.num_devices, -1)

    def run(**fields):
        def method(problem):
            return walk(problem, table={"x": stored}, batch=8)._replace(**fields)

        return solve(method, problem=problem)

    def sharded(x):
        return {"table": {}, "sharded_tables": {"rows": {"x": x}}}

    host_column = HostColumn(stored, np.ones(24, bool))
    for fields in ({}, {"table": {"x": host_column}}, sharded(executor.shard(stored))):
        assert run(**fields).steps == 7
    # A table that was left on the host, or on one device, would be copied every call.
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        run(**sharded(shards))
    if name != "vmap":
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-"):
            run(**sharded(jnp.asarray(shards)))
