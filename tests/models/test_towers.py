"""Attention and edge histograms against plain implementations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.models import towers

# Rows that attend to all tokens, to some, to one, to none.
MASK = jnp.arange(7)[None, :] < jnp.array([7, 4, 1, 0, 2])[:, None]


def attention_inputs(dtype=jnp.float32):
    """Query, key and value of 5 rows with 2 heads of size 4."""
    keys = jax.random.split(jax.random.key(2), 3)
    query, key, value = (
        2 * jax.random.normal(key, (5, count, 2, 4), dtype)
        for key, count in zip(keys, (3, 7, 7), strict=True)
    )
    return query, key, value


def jax_attention(query, key, value, mask=None):
    bias = None if mask is None else jnp.where(mask, 0.0, -1e9)[:, None, None, :]
    mixed = jax.nn.dot_product_attention(query, key, value, bias=bias)
    return mixed.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("mask", [None, MASK, ~MASK], ids=["all", "first", "last"])
def test_attention_and_gradients_equal_those_of_jax(mask):
    inputs = attention_inputs()

    def value_and_gradients(attend):
        def total(*inputs):
            mixed = attend(*inputs, mask)
            return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum()

        return jax.jit(attend)(*inputs, mask), jax.grad(total, (0, 1, 2))(*inputs)

    found, expected = map(value_and_gradients, (towers.attend, jax_attention))
    assert found[0].shape == (5, 2, 3, 4)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_attention_with_large_scores_or_in_bfloat16():
    query, key, value = attention_inputs()
    inputs = 1e3 * query, 1e3 * key, value, MASK
    found, expected = towers.attend(*inputs), jax_attention(*inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    inputs = attention_inputs(jnp.bfloat16)
    found = towers.attend(*inputs, MASK)
    assert found.dtype == jnp.bfloat16
    expected = towers.attend(*(x.astype(jnp.float32) for x in inputs), MASK)
    np.testing.assert_allclose(np.float32(found), expected, atol=0.02, rtol=0.02)


def test_queries_get_the_same_output_as_inside_the_block():
    block = towers.Block(heads=2, dtype=jnp.dtype("float32"))
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    mask = jnp.arange(5)[None, :] < jnp.array([[5], [3], [1]])
    params = block.init(jax.random.key(1), x, mask)
    full = np.asarray(block.apply(params, x, mask))
    queries = block.apply(params, x, mask, x[:, 1:3])
    np.testing.assert_allclose(np.asarray(queries), full[:, 1:3], atol=1e-6)


def plain_edge_histograms(x, cell, bins):
    y = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dx = (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]).sum(-1)
    dy = (y[:, 2:, 1:-1] - y[:, :-2, 1:-1]).sum(-1)
    magnitude = np.sqrt(dx * dx + dy * dy + 1e-6)
    angle = np.arange(bins) * np.pi / bins
    along = np.abs(dx[..., None] * np.cos(angle) + dy[..., None] * np.sin(angle))
    h = magnitude[..., None] * (along / magnitude[..., None]) ** bins
    num_rows, side = len(x), x.shape[1] // cell
    h = h.reshape(num_rows, side, cell, side, cell, bins).sum((2, 4))
    return np.sqrt(h / cell + 1e-6)


@pytest.mark.parametrize("cell, bins", [(1, 8), (2, 8), (4, 8), (3, 8), (4, 4)])
def test_edge_histograms_equal_the_plain_formula(cell, bins):
    x = np.random.default_rng(0).normal(size=(3, 12, 12, 3))
    x[1] = 0.7  # without edges
    x[2, :, 6:] = -x[2, :, 6:].mean()
    inputs = jnp.asarray(x, jnp.float32)
    found = towers.edge_histograms(inputs, cell, bins)
    np.testing.assert_allclose(found, plain_edge_histograms(x, cell, bins), atol=1e-5)
    gradient = jax.grad(lambda x: towers.edge_histograms(x, cell, bins).sum())(inputs)
    assert np.isfinite(gradient).all()
