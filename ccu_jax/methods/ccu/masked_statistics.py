"""Statistics of the valid rows of padded tables.

Letters: N, M rows, F predictors. `valid` is true for the rows that count; padding rows
may hold any finite values.
"""

import jax
import jax.numpy as jnp
from jax import Array


def mean(x_N: Array, valid_N: Array) -> Array:
    """Returns the mean; 0 if no row is valid."""
    total = jnp.where(valid_N, x_N, 0.0).sum()
    return total / jnp.maximum(valid_N.sum(), 1)


def std(x_N: Array, valid_N: Array) -> Array:
    """Returns the standard deviation; 0 if no row is valid."""
    center = mean(x_N, valid_N)
    return jnp.sqrt(mean((x_N - center) ** 2, valid_N))


def sort_valid(x_N: Array, valid_N: Array) -> Array:
    """Sorts the values in ascending order, followed by infinity for padding rows."""
    return jnp.sort(jnp.where(valid_N, x_N, jnp.inf))


def quantile(q: Array, x_N: Array, valid_N: Array) -> Array:
    """Returns quantiles with linear interpolation, as `numpy.quantile` does."""
    sorted_N = sort_valid(x_N, valid_N)
    last = jnp.maximum(valid_N.sum() - 1, 0)
    position = q * last
    low = jnp.floor(position).astype(jnp.int32)
    a, b = sorted_N[low], sorted_N[jnp.minimum(low + 1, last)]
    return a + (position - low) * (b - a)


def ecdf(x_M: Array, sample_N: Array, valid_N: Array) -> Array:
    """Returns the fraction of a sample that is below each x, strictly in (0, 1).

    Ties count half. With n valid rows, the fraction is (count + 1/2) / (n + 1).
    """
    sorted_N = sort_valid(sample_N, valid_N)
    num_below = jnp.searchsorted(sorted_N, x_M, side="left")
    num_up_to = jnp.searchsorted(sorted_N, x_M, side="right")
    return ((num_below + num_up_to) / 2 + 0.5) / (valid_N.sum() + 1)


def rank(x_N: Array, valid_N: Array) -> Array:
    """Returns ranks among the valid rows, evenly spaced in (0, 1)."""
    place = jnp.argsort(jnp.argsort(jnp.where(valid_N, x_N, jnp.inf)))
    place = (place + 0.5) / jnp.maximum(valid_N.sum(), 1)
    return jnp.where(valid_N, place, 0.5)


def fit_line(x_NxF: Array, y_N: Array, valid_N: Array) -> Array:
    """Fits least squares with an intercept; returns coefficients `[F + 1]`."""
    mask = valid_N[:, None].astype(x_NxF.dtype)
    x = jnp.concatenate([x_NxF, jnp.ones((len(x_NxF), 1))], axis=1) * mask
    gram = x.T @ x + 1e-3 * jnp.eye(x.shape[1])
    return jnp.linalg.solve(gram, x.T @ jnp.where(valid_N, y_N, 0.0))


def predict_line(coefficients: Array, x_NxF: Array) -> Array:
    """Evaluates the line of `fit_line`: `[N]`."""
    return x_NxF @ coefficients[:-1] + coefficients[-1]


def uniform_per_row(key: Array, num_rows: int) -> Array:
    """Draws a uniform number in [0, 1) for each row, regardless of later rows."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
    return jax.vmap(jax.random.uniform)(keys)
