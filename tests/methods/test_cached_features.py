"""Padding of feature tables."""

import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.methods import METHODS, cached_features
from tests import toy
from tests.train.test_step import run


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8, 64])
def test_padded_sizes_are_few_and_divisible(num_devices):
    counts, compute_size = np.arange(1, 5000), cached_features.compute_padded_size
    sizes = np.array([compute_size(int(count), num_devices) for count in counts])
    assert (sizes >= counts).all() and not (sizes % num_devices).any()
    assert (np.diff(sizes) >= 0).all() and len(set(sizes)) < 64
    min_step = np.lcm(8, num_devices)
    max_padding = np.maximum(min_step, counts * np.gcd(3, num_devices) / 4)
    assert (sizes - counts < max_padding).all()


def run_with_padding(name, monkeypatch, padding, multi_label):
    """Returns sizes of tables, metrics and outputs of a run; None: default padding."""
    config = toy.make_config(
        ccu={"stop": True, "steps": 6}, ccu_plus={"steps": 6, "feedback_gain": 1.0}
    )
    data = toy.make_dataset(num_rows=70, multi_label=multi_label)
    problem = toy.make_problem(executors.vmap(1), data, config)
    if padding is not None:
        monkeypatch.setattr(
            cached_features, "compute_padded_size", lambda count, _: count + padding
        )
    program = METHODS[name](problem)
    monkeypatch.undo()
    sizes = {part: x["row"].size for part, x in program.sharded_tables.items()}
    state, metrics = run(problem.executor, program)
    params, rows = {**problem.original, **state.params}, np.arange(70)
    outputs = problem.forward.compute_outputs(params, problem.table, rows)
    outputs = {name: outputs[name] for name in ("image", "text", "fused", "z_image")}
    return sizes, {**metrics, **outputs}


@pytest.mark.parametrize("padding", [None, pytest.param(37, marks=pytest.mark.table)])
@pytest.mark.parametrize(
    "name, multi_label",
    [
        ("ccu_plus", False),
        pytest.param("ccu", True, marks=pytest.mark.slow),
        pytest.param("ccu_plus", True, marks=pytest.mark.table),
        pytest.param("ccu", False, marks=pytest.mark.table),
    ],
)
def test_padding_does_not_change_a_run(name, multi_label, padding, monkeypatch):
    sizes, expected = run_with_padding(name, monkeypatch, 0, multi_label)
    other_sizes, found = run_with_padding(name, monkeypatch, padding, multi_label)
    assert expected["ran"].any() or name == "ccu"
    assert other_sizes != sizes
    np.testing.assert_array_equal(found["ran"], expected["ran"])
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=2e-4, atol=2e-5, err_msg=key)
