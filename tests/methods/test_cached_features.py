"""Tables of stored features: what fills them up, and batches of several parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors as parallel
from ccu_jax.methods import METHODS
from ccu_jax.methods import cached_features as cache
from ccu_jax.train.step import init_state, make_steps, static_inputs
from tests import toy


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64])
def test_tables_have_one_of_few_sizes_that_the_devices_divide(devices):
    counts = np.arange(1, 5000)
    sizes = np.array([cache.padded_size(int(count), devices) for count in counts])
    assert (sizes >= counts).all() and not (sizes % devices).any()
    assert (np.diff(sizes) >= 0).all() and len(set(sizes)) < 64
    # Few rows too many, but that every device has to get as many as the others.
    even = np.lcm(8, devices)
    assert (sizes - counts < np.maximum(even, counts * np.gcd(3, devices) / 4)).all()


def after_padding(name, monkeypatch, more, **of):
    """What a whole run of a method comes to with so many more rows in its tables."""
    settings = toy.make_config(
        ccu={"stop": True, "steps": 6}, ccu_plus={"steps": 6, "feedback_gain": 1.0}
    )
    problem = toy.make_problem(parallel.vmap(1), toy.make_dataset(**of), settings)
    if more is not None:
        monkeypatch.setattr(cache, "padded_size", lambda count, devices: count + more)
    program = METHODS[name](problem)
    sizes = {part: x["row"].size for part, x in program.sharded_tables.items()}
    monkeypatch.undo()
    state = init_state(program, jax.random.key(3))
    steps = problem.executor.compile(make_steps(program))
    share = toy.step_inputs_of(problem.executor, program)
    state, metrics = jax.device_get(steps(state, static_inputs(program), share))
    params = {**problem.params, **state.params}
    every = np.arange(len(problem.table["labels"]))
    out = problem.forward.outputs(params, problem.table, every)
    said = {view: out[view] for view in ("image", "text", "fused", "z_image")}
    return sizes, {**metrics, **said}


# As many as there really are, and a number that no size goes by.
@pytest.mark.parametrize("more", [None, pytest.param(37, marks=pytest.mark.table)])
@pytest.mark.parametrize(
    "name, multi_label",
    [
        ("ccu_plus", False),
        pytest.param("ccu", True, marks=pytest.mark.slow),
        pytest.param("ccu_plus", True, marks=pytest.mark.table),
        pytest.param("ccu", False, marks=pytest.mark.table),
    ],
)
def test_rows_that_fill_up_the_tables_change_no_run(
    name, multi_label, more, monkeypatch
):
    solve = functools.partial(
        after_padding, name, monkeypatch, rows=70, multi_label=multi_label
    )
    (sizes, expected), (other, found) = solve(0), solve(more)
    assert expected["ran"].any() or name == "ccu"
    assert other != sizes
    np.testing.assert_array_equal(found["ran"], expected["ran"])
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=2e-4, atol=2e-5, err_msg=key)


# --- one pass for all parts of a batch ------------------------------------------------


def test_the_parts_of_a_batch_go_together_and_come_apart_again():
    batch = {
        "b": {"labels": jnp.ones((3, 2)), "x": jnp.arange(3), "own": jnp.zeros(3)},
        "a": {"labels": jnp.zeros((2, 2)), "x": jnp.arange(7, 9)},
    }
    every, cut = cache.concat_parts(batch, dropout_part="a")
    assert set(every) == {"labels", "x", "use_dropout"}
    assert len(every["labels"]) == 5
    apart = cut(every)
    for part, rows in batch.items():
        for column in ("labels", "x"):
            np.testing.assert_array_equal(apart[part][column], rows[column])
        assert (apart[part]["use_dropout"] == (part == "a")).all()
    assert not cache.concat_parts(batch)[0]["use_dropout"].any()
