"""Forward passes return each row's outputs, however the batches are divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.distributed import executors
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.evaluate.forward import Forward, pool_tokens
from tests import toy
from tests.evaluate.conftest import record_calls

ROWS = np.array([5, 0, 11, 3, 3, 54, 20, 21, 22, 30, 31, 9, 17])
EXECUTORS = [
    (executors.vmap, (1,), 4),
    (executors.vmap, (2,), 6),
    (executors.vmap, (4,), 7),  # rounded up to 8
    (executors.vmap, (1,), 64),  # more than there are rows
    (executors.pmap, (), 8),
]


@pytest.fixture(scope="module")
def problem():
    return toy.make_problem(executors.vmap(1))


@pytest.fixture(scope="module")
def expected(problem):
    """Outputs and features of `ROWS` without any executor."""
    rows = {name: x[ROWS] for name, x in problem.table.items()}
    outputs = jax.jit(problem.model.apply)(problem.params, rows)
    features = jax.jit(problem.model.trunk)(problem.params, rows["image"])
    pooled = {"pooled": pool_tokens(features)}
    return outputs._asdict() | pooled, {"features": features, "h_text": outputs.h_text}


@pytest.mark.parametrize("make, devices, batch", EXECUTORS)
def test_rows_have_their_outputs_for_any_batch_executor_and_table(
    problem, expected, make, devices, batch
):
    executor = make(*devices)
    forward = Forward(problem.model, executor, batch)
    params, table = executor.replicate((problem.params, problem.table))
    outputs = forward.compute_outputs(params, table, ROWS)
    values = outputs, forward.encode(params, table, ROWS)
    for value, reference in zip(values, expected, strict=True):
        assert set(value) == set(reference)
        for name, x in value.items():
            assert x.shape == reference[name].shape
            np.testing.assert_allclose(x, reference[name], atol=1e-5, err_msg=name)
    # Outputs from features on the host and on devices are bit-identical to those from
    # images.
    encoded = forward.encode(params, table, np.arange(len(table["labels"])))
    valid = np.ones(len(table["labels"]), bool)
    has = {name: table[name] for name in ("has_image", "has_text")}
    for columns in (
        encoded,
        {name: HostColumn(x, valid) for name, x in encoded.items()},
        executor.replicate(encoded),
    ):
        for name, x in forward.compute_outputs(params, has | columns, ROWS).items():
            assert x.tobytes() == outputs[name].tobytes(), name


def test_passes_are_traced_once_for_all_calls(problem):
    traced, names = [], ("trunk", "encode_text", "apply")
    model = record_calls(problem.model, names, traced)
    forward = Forward(model, executors.vmap(2), 8)
    for seed, rows in enumerate((ROWS, ROWS[:3], np.arange(40))):
        params = problem.model.init(jax.random.key(seed))
        forward.compute_outputs(params, problem.table, rows)
        encoded = forward.encode(params, problem.table, rows)
        has = {name: problem.table[name][rows] for name in ("has_image", "has_text")}
        forward.compute_outputs(params, has | encoded, np.arange(len(rows)))
    assert sorted(traced) == sorted(names)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_pooled_features_are_equal_on_host_and_device(dtype):
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(dtype)
    expected = np.concatenate([x[:, 0], x[:, 1:].astype(np.float32).mean(1)], axis=1)
    on_host, on_device = pool_tokens(x), pool_tokens(jnp.asarray(x))
    assert isinstance(on_host, np.ndarray) and isinstance(on_device, jax.Array)
    for pooled in (on_host, on_device):
        assert pooled.dtype == np.float32
        np.testing.assert_allclose(pooled, expected, atol=1e-6)
