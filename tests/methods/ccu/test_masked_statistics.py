"""Statistics of valid rows against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.methods.ccu import masked_statistics as stats


def values_and_mask(rng, num_rows):
    """Values of which some are invalid and large."""
    valid = rng.random(num_rows) < 0.6
    valid[0], valid[-1] = True, False
    values = rng.normal(size=num_rows).astype(np.float32)
    values[~valid] = 50 * rng.normal(size=(~valid).sum())
    return jnp.array(values), jnp.array(valid)


def test_simple_values():
    valid = jnp.ones(4, bool)
    ranks = stats.rank(jnp.array([5.0, -1.0, 9.0, 0.0]), valid)
    np.testing.assert_allclose(ranks, [0.625, 0.125, 0.875, 0.375])
    ecdf = stats.ecdf(jnp.array([0.0, 2, 9]), jnp.array([3.0, 1, 2, 2]), valid)
    np.testing.assert_allclose(ecdf, np.array([0.5, 2.5, 4.5]) / 5, rtol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 101])
def test_quantiles_equal_those_of_numpy(num_rows):
    rng = np.random.default_rng(num_rows)
    values, valid = values_and_mask(rng, 2 * num_rows)
    q = np.array([0.0, 1.0, 0.5, *rng.random(9)], np.float32)
    found = stats.quantile(jnp.array(q), values, valid)
    expected = np.quantile(np.asarray(values)[np.asarray(valid)], q)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_invalid_rows_are_ignored():
    rng = np.random.default_rng(8)
    values, valid = values_and_mask(rng, 60)
    remaining = values[valid]
    every = jnp.ones(len(remaining), bool)
    np.testing.assert_allclose(stats.mean(values, valid), remaining.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.std(values, valid), remaining.std(), rtol=1e-5)
    in_order = stats.sort_valid(values, valid)
    np.testing.assert_array_equal(in_order[: len(remaining)], jnp.sort(remaining))
    assert jnp.isinf(in_order[len(remaining) :]).all()
    ranks = stats.rank(values, valid)
    np.testing.assert_allclose(ranks[valid], stats.rank(remaining, every), rtol=1e-6)
    x = jnp.concatenate([jnp.array(rng.normal(size=9)), remaining[:3]])
    np.testing.assert_array_equal(
        stats.ecdf(x, values, valid), stats.ecdf(x, remaining, every)
    )
    no_rows = jnp.zeros(60, bool)
    assert stats.mean(values, no_rows) == stats.std(values, no_rows) == 0


def test_line_is_fitted_to_the_valid_rows():
    rng = np.random.default_rng(3)
    x = jnp.array(rng.normal(size=(50, 2)))
    y = x @ jnp.array([2.0, -1.0]) + 0.5
    valid = jnp.arange(50) < 40
    line = stats.fit_line(x, jnp.where(valid, y, 7.0), valid)
    np.testing.assert_allclose(line, [2, -1, 0.5], atol=1e-3)
    np.testing.assert_allclose(stats.predict_line(line, x), y, atol=1e-3)


def test_random_numbers_of_rows_do_not_depend_on_later_rows():
    key = jax.random.key(3)
    few, many = stats.uniform_per_row(key, 5), stats.uniform_per_row(key, 400)
    np.testing.assert_array_equal(few, many[:5])
    assert len(set(many.tolist())) == 400 and abs(many.mean() - 0.5) < 0.05
