"""Every method on one device, on many, and under every executor: the same comes out."""

import functools

import jax
import numpy as np
import pytest

from ccu_jax.distributed import executors as parallel
from ccu_jax.models import VIEWS
from ccu_jax.train.step import init_state, make_steps, static_inputs
from tests import toy
from tests.methods.test_methods import CLOSED, METHODS, SLOW, these
from tests.toy import with_fitted_labels


def with_devices(monkeypatch, make, devices):
    """An executor on the first devices only."""
    those = jax.devices()[:devices]
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda: devices)
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *_: those)
    return make()


def after_all_steps(name, executor, lower_only=False):
    """What is said of all rows after a method's own steps, refreshes on the way.

    Not the parameters: that of the keys' bias has no effect and no gradient but
    rounding, which Adam makes steps of.
    """
    problem = with_fitted_labels(toy.make_problem(executor))
    program = METHODS[name](problem)._replace(stop=None)
    params = program.params
    if name not in CLOSED:
        # Away from the original, where what keeps to it has a gradient of rounding
        # alone (of CCU's fused head, say), and Adam makes steps of that, too.
        away = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
        program = program._replace(params=executor.replicate(away))
        state = executor.replicate(init_state(program, jax.random.key(3)))
        rest = executor.replicate(static_inputs(program))
        share = toy.step_inputs_of(executor, program)
        for x in jax.tree.leaves(program.sharded_tables):
            assert len(x) == executor.num_devices
        steps = executor.compile(make_steps(program), donate=True)
        if lower_only:
            return steps.lower(state, rest, share)
        state, metrics = jax.device_get(steps(state, rest, share))
        assert metrics["ran"].all() and np.isfinite(metrics["loss"]).all()
        result = program.result or (lambda params, aux: params)
        params = result(state.params, state.aux)
    table = problem.table
    out = problem.forward.outputs(
        {**problem.params, **params}, table, np.arange(len(table["labels"]))
    )
    return {view: np.asarray(out[view]) for view in VIEWS}


@functools.cache
def oracle(name):
    return after_all_steps(name, parallel.vmap(1))


def agree(found, expected):
    for view, logits in expected.items():
        np.testing.assert_allclose(found[view], logits, rtol=0, atol=1e-4)


@these(fast=(), slow=("original", "neggrad_plus", "ccu_plus", "ssd"))
def test_eight_devices_give_what_one_device_gives(name):
    agree(after_all_steps(name, parallel.pmap()), oracle(name))


@pytest.mark.parametrize(
    "executor", ["shard_map", pytest.param("vmap", marks=pytest.mark.table)]
)
@these(fast=(), slow=("ccu_plus",))
def test_every_executor_gives_what_one_device_gives(name, executor):
    agree(after_all_steps(name, parallel.EXECUTORS[executor]()), oracle(name))


@these(fast=(), slow=("original", "ccu", *SLOW, "scrub_rewind"))
def test_the_strict_executor_takes_every_method(name):
    """It refuses a step with an output that was never reduced while it is traced."""
    assert after_all_steps(name, parallel.shard_map(), lower_only=True)


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.table)])
@these(fast=(), slow=("ccu_plus",), of=("original", "ccu", "ccu_plus"))
def test_the_number_of_devices_changes_nothing(name, devices, monkeypatch):
    executor = with_devices(monkeypatch, parallel.pmap, devices)
    assert executor.num_devices == devices
    agree(after_all_steps(name, executor), oracle(name))
