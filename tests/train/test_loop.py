"""The loop: it goes on where it was cut off, stops, fails and compiles as promised."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ccu_jax import errors
from ccu_jax.config.schema import Run
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed import preemption
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.distributed.executors import AXIS
from ccu_jax.train import step
from ccu_jax.train.program import Program
from ccu_jax.train.step import init_state, make_steps, static_inputs
from tests import toy
from tests.toy import NullStage, make_loop, problem_and_loop, run_method, trees_equal

NUMBERS = {"x": np.linspace(0, 1, 20, dtype=np.float32)}


def walk(problem, steps=7, fail_at=None, stop_after=None, table=NUMBERS, batch=4):
    """A method for the loop alone: a step of gradient descent costs nothing."""

    def loss(params, frozen, aux, batch, step):
        draw = jax.vmap(jax.random.uniform)(batch["rows"]["key"])
        away = batch["rows"]["x"] * params["w"] - draw
        total = jax.lax.pmean((away**2).mean(), AXIS)
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
        refresh=lambda params, frozen, aux, parts: aux + 1,
        stop=None if stop_after is None else lambda aux: aux >= stop_after,
    )


class Cut(Exception):
    pass


class CutOff(NullStage):
    """A stage that ends the run like a kill, once so many steps are reported."""

    def __init__(self, after):
        self.after = after

    def update(self, done, *args, **kwargs):
        if done >= self.after:
            raise Cut


@pytest.fixture(scope="module", params=[None, 3, 4])
def uncut(request, tmp_path_factory):
    """Walks that may stop themselves, a loop that knows them, and one's good end."""
    problem, _ = problem_and_loop()
    method = functools.partial(walk, stop_after=request.param)
    loop = make_loop(problem, Run(steps_per_call=2, checkpoint_steps=2))
    folder = tmp_path_factory.mktemp("whole") / "steps"
    outcome = loop.run("walk", method, problem, folder, NullStage())
    assert outcome.steps == request.param or outcome.steps == 7
    return method, loop, outcome


@pytest.mark.parametrize("after", range(1, 8))
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_bits(
    uncut, tmp_path, after
):
    problem, _ = problem_and_loop()
    method, loop, whole = uncut
    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        loop.run("walk", method, problem, folder, CutOff(min(after, whole.steps)))
    outcome = loop.run("walk", method, problem, folder, NullStage())
    assert trees_equal(outcome.params, whole.params)
    assert outcome.steps == whole.steps


def test_what_comes_out_may_be_another_state_than_the_last(tmp_path):
    problem, _ = problem_and_loop()

    def method(problem):
        result = lambda params, aux: {"w": params["w"] + aux}  # noqa: E731
        return walk(problem)._replace(result=result)

    plain, other = (
        make_loop(problem, Run(steps_per_call=2)).run(
            "walk", of, problem, tmp_path / "none", NullStage()
        )
        for of in (walk, method)
    )
    # Refreshed before each of seven steps: from -1 to 6.
    assert other.params["w"] == plain.params["w"] + 6 and other.steps == 7


def test_steps_between_refreshes_are_data_of_the_program(tmp_path):
    """Who asks for others gets others, and waits for no compiler."""
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=2))
    traces = []

    def counting(every):
        def refresh(params, frozen, aux, parts):
            traces.append(every)
            return aux + 1

        program = walk(problem)._replace(refresh=refresh, refresh_every=every)
        return program._replace(result=lambda params, aux: {"w": 1.0 * aux})

    for every, looks in ((1, 7), (3, 3), (2, 4), (1_000_000, 1)):
        outcome = loop.run(
            "walk",
            lambda _, e=every: counting(e),
            problem,
            tmp_path / "none",
            NullStage(),
        )
        assert outcome.params["w"] == looks - 1, every
    assert set(traces) == {1}, "one program for all"


def cut_walk(problem, **kwargs):
    """`walk` on a table that is cut over the devices."""
    program = walk(problem, **kwargs)
    return program._replace(
        table={}, sharded_tables={"rows": problem.executor.shard_tree(program.table)}
    )


def test_steps_on_a_cut_table_end_as_those_on_a_whole_one_wherever_they_are_cut_off(
    tmp_path,
):
    problem, _ = problem_and_loop()

    def solve(method, stage, folder, **run):
        loop = make_loop(problem, Run(**run))
        return loop.run("walk", method, problem, tmp_path / folder, stage)

    expected = solve(walk, NullStage(), "none", steps_per_call=2)
    calls = []
    for every in (2, 3, 100):
        stage = NullStage()
        stage.update = lambda done, *args, **kwargs: calls.append(done)
        run = {"checkpoint_steps": every, "steps_per_call": 1}
        calls.clear()
        outcome = solve(cut_walk, stage, f"whole-{every}", **run)
        assert trees_equal(outcome.params, expected.params) and outcome.steps == 7
        # One call between two checkpoints, however many steps the others make.
        ends = [0, *range(every, 7, every), 7]
        assert sorted(set(calls)) == ends
    for after in (2, 4, 6):
        run = {"checkpoint_steps": 2}
        with pytest.raises(Cut):
            solve(cut_walk, CutOff(after), f"cut-{after}", **run)
        assert (tmp_path / f"cut-{after}").exists() == (after > 2)
        outcome = solve(cut_walk, NullStage(), f"cut-{after}", **run)
        assert trees_equal(outcome.params, expected.params) and outcome.steps == 7


@pytest.mark.parametrize(("fail_at", "kept"), [(0, 0), (1, 0), (3, 2), (6, 6)])
@pytest.mark.parametrize("every", [2, 100])
def test_a_run_that_diverges_says_when_and_keeps_what_was_good(
    tmp_path, fail_at, kept, every
):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=2, checkpoint_steps=every))
    kept = kept if every == 2 else 0
    method = functools.partial(walk, fail_at=fail_at)
    outcome = loop.run("walk", method, problem, tmp_path / "steps", NullStage())
    told = f"step {fail_at}: loss nan; what it was at step {kept} is kept"
    assert outcome.diverged == told and outcome.steps == fail_at
    good = {"w": np.float32(3)}
    if kept:
        method = functools.partial(walk, steps=kept)
        good = loop.run("walk", method, problem, tmp_path / "none", NullStage()).params
    assert trees_equal(outcome.params, good)


def test_parameters_that_an_update_has_broken_are_not_kept_as_good(tmp_path):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=2, checkpoint_steps=2))

    def method(problem):
        # Loss and gradient of step 3 are numbers, what comes of them is none.
        def rate(step):
            return jnp.where(step == 3, jnp.inf, 0.1)

        return walk(problem)._replace(optimizer=optax.sgd(rate))

    outcome = loop.run("walk", method, problem, tmp_path / "steps", NullStage())
    assert outcome.diverged.startswith("step 3: parameters of w are not finite; what")
    assert outcome.diverged.endswith("at step 2 is kept")
    assert np.isfinite(outcome.params["w"])


def test_parameters_that_are_no_numbers_are_a_failure_too(tmp_path):
    problem, _ = problem_and_loop()
    bad = {"w": np.float32(np.inf)}

    def made(problem):
        return walk(problem)._replace(result=lambda params, aux: bad)

    def closed(problem):
        return Program(params=bad, frozen=(), loss=None)

    loop = make_loop(problem, Run(steps_per_call=2))
    for method, steps in ((made, 7), (closed, 0)):
        outcome = loop.run("walk", method, problem, tmp_path / "none", NullStage())
        assert outcome.diverged == "parameters of w are not finite"
        assert outcome.steps == steps


def test_settings_of_training_make_another_program(tmp_path):
    """They are constants in it: one loop must not mix up two of them."""
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=2))

    def method(problem):
        return walk(problem)._replace(
            optimizer=optax.sgd(problem.config.train.contrastive_weight)
        )

    def solved(loop, align):
        given = problem._replace(
            config=toy.make_config(train={"contrastive_weight": align})
        )
        return loop.run("walk", method, given, tmp_path / "none", NullStage()).params

    first, second = solved(loop, 0.1), solved(loop, 0.01)
    assert not trees_equal(first, second)
    assert trees_equal(second, solved(make_loop(problem, Run(steps_per_call=2)), 0.01))


def test_methods_that_come_to_the_same_program_share_what_is_compiled(
    tmp_path, monkeypatch
):
    problem, _ = problem_and_loop()
    loop = make_loop(problem)
    compiled = []

    def counting(lowered):
        compiled.append(lowered)
        return compile_it(lowered)

    compile_it = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", counting)
    steps = {}
    for name in ("original", "retrain", "retrain_visual", "finetune"):
        outcome, _ = run_method(name, tmp_path, loop=loop)
        steps[name] = outcome.steps
    assert steps["retrain"] < steps["original"]  # another length, other rows
    assert len(compiled) == 1


# --- what may not be copied -----------------------------------------------------------


@pytest.mark.parametrize("executor", parallel.EXECUTORS)
def test_nothing_is_copied_unasked_during_the_steps(executor, tmp_path):
    problem, _ = problem_and_loop()
    problem = problem._replace(executor=parallel.EXECUTORS[executor]())
    stored = np.linspace(0, 1, 24, dtype=np.float32)
    cut = stored.reshape(problem.executor.num_devices, -1)

    def changed(**fields):
        def method(problem):
            program = walk(problem, table={"x": stored}, batch=8)
            return program._replace(**fields)

        loop = make_loop(problem, Run(steps_per_call=2))
        return loop.run("walk", method, problem, tmp_path / "none", NullStage())

    # Rows that are on the devices, that are sent for each call, that are cut.
    for fields in (
        {},
        {"table": {"x": HostColumn(stored, np.ones(24, bool))}},
        {
            "table": {},
            "sharded_tables": {"rows": problem.executor.shard_tree({"x": stored})},
        },
    ):
        assert changed(**fields).steps == 7
    # A table that was left on the host would be copied for every call.
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        changed(table={}, sharded_tables={"rows": {"x": cut}})
    if executor != "vmap":
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-"):
            changed(table={}, sharded_tables={"rows": {"x": jnp.asarray(cut)}})


def test_what_has_stopped_is_looked_at_no_more():
    problem, _ = problem_and_loop()
    looks = []

    def refresh(params, frozen, aux, parts):
        jax.debug.callback(looks.append, aux)
        return aux + 1

    program = walk(problem, steps=8, stop_after=3)._replace(refresh=refresh)
    executor = parallel.vmap(1)
    state = executor.replicate(init_state(program, jax.random.key(0)))
    steps = executor.compile(make_steps(program))
    share = toy.step_inputs_of(executor, program)
    state, metrics = steps(state, static_inputs(program), share)
    jax.effects_barrier()
    assert int(metrics["ran"].sum()) == 3 == int(state.step)
    assert len(looks) == 4  # from -1 to 2; the last answer stops it


def test_who_is_told_to_leave_saves_and_goes_on_to_the_same_end(tmp_path, monkeypatch):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=2, checkpoint_steps=100))
    method = functools.partial(walk, steps=9)
    whole = loop.run("walk", method, problem, tmp_path / "whole", NullStage())
    asked = iter([False, True])
    monkeypatch.setattr(preemption, "due", lambda last: next(asked))
    with pytest.raises(errors.Preempted):
        loop.run("walk", method, problem, tmp_path / "cut", NullStage())
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"4"}
    monkeypatch.setattr(preemption, "due", lambda last: False)
    on = loop.run("walk", method, problem, tmp_path / "cut", NullStage())
    assert trees_equal(whole.params, on.params) and on.steps == 9


def test_who_is_told_during_the_last_call_saves_it(tmp_path, monkeypatch):
    problem, _ = problem_and_loop()
    loop = make_loop(problem, Run(steps_per_call=100, checkpoint_steps=100))
    method = functools.partial(walk, steps=9)
    whole = loop.run("walk", method, problem, tmp_path / "whole", NullStage())
    wait = jax.block_until_ready

    def told(tree):
        preemption._Word.told = preemption._Word.working
        return wait(tree)

    monkeypatch.setattr(preemption._Word, "told", False)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "block_until_ready", told)
        with pytest.raises(errors.Preempted):
            loop.run("walk", method, problem, tmp_path / "cut", NullStage())
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"9"}
    preemption._Word.told = False
    monkeypatch.setattr(step, "step_inputs", lambda *args: pytest.fail("a step"))
    monkeypatch.setattr(loop, "_compile", lambda *args: (None, 0.0))
    on = loop.run("walk", method, problem, tmp_path / "cut", NullStage())
    assert trees_equal(whole.params, on.params) and on.steps == 9


LISTENS = """
import os, signal, subprocess, sys, time
from ccu_jax.distributed import preemption
preemption.install()

def term():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)

"""
SAVES = """
with preemption.working():
    assert not preemption.due()
    term()
    term()
    assert preemption.due()
    print("saved", flush=True)
print("never", flush=True)
"""
IDLE = """
with preemption.working():
    assert not preemption.due()
print("idle", flush=True)
term()
print("never", flush=True)
"""
# In C, as when it waits for another process: Python's own handlers are not called.
BUSY = """
import ctypes, threading
threading.Timer(0.2, term).start()
print("busy", flush=True)
lock = ctypes.pointer((ctypes.c_long * 16)())
ctypes.CDLL(None).pthread_mutex_lock(lock)
ctypes.CDLL(None).pthread_mutex_lock(lock)
print("never", flush=True)
"""


@pytest.mark.parametrize(
    "code, told", [(SAVES, "saved\n"), (IDLE, "idle\n"), (BUSY, "busy\n")]
)
def test_a_signal_ends_at_once_what_need_not_be_saved_and_waits_for_steps(code, told):
    done = subprocess.run(
        [sys.executable, "-c", LISTENS + code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (errors.RETRY_EXIT_CODE, told)
    assert done.stderr.strip() == preemption.MESSAGE
