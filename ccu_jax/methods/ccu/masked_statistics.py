"""Statistics of the rows that count: tables are filled up to one of few sizes.

Letters: N, M rows, R retained rows, F features, K classes. A row counts where its
`weight` is true; the others may hold anything finite.
"""

import jax
import jax.numpy as jnp


def mean(value_N, weight_N):
    """Mean of the rows that count; 0 where none does."""
    total = jnp.where(weight_N, value_N, 0.0).sum()
    return total / jnp.maximum(weight_N.sum(), 1)


def std(value_N, weight_N):
    """Standard deviation of the rows that count."""
    centre = mean(value_N, weight_N)
    return jnp.sqrt(mean((value_N - centre) ** 2, weight_N))


def sort_valid(value_N, weight_N):
    """The values in rising order, those that do not count at the end, infinite."""
    return jnp.sort(jnp.where(weight_N, value_N, jnp.inf))


def quantile(share, value_N, weight_N):
    """Quantiles of the rows that count, linear between neighbours (Hyndman type 7)."""
    rising = sort_valid(value_N, weight_N)
    last = jnp.maximum(weight_N.sum() - 1, 0)
    place = share * last
    low = jnp.floor(place).astype(jnp.int32)
    a, b = rising[low], rising[jnp.minimum(low + 1, last)]
    return a + (place - low) * (b - a)


def ecdf(x_N, of_M, weight_M):
    """Share of the values `of` that are below each x, ties counting half, in (0, 1)."""
    rising = sort_valid(of_M, weight_M)
    below = jnp.searchsorted(rising, x_N, side="left")
    upto = jnp.searchsorted(rising, x_N, side="right")
    return ((below + upto) / 2 + 0.5) / (weight_M.sum() + 1)


def fit_line(x_NxF, y_N, weight_N):
    """Least squares with a constant: `[F + 1]` coefficients."""
    counts = weight_N[:, None].astype(x_NxF.dtype)
    x = jnp.concatenate([x_NxF, jnp.ones((len(x_NxF), 1))], axis=1) * counts
    gram = x.T @ x + 1e-3 * jnp.eye(x.shape[1])
    return jnp.linalg.solve(gram, x.T @ jnp.where(weight_N, y_N, 0.0))


def predict_line(coefficients, x_NxF):
    """What `fit_line` found, applied."""
    return x_NxF @ coefficients[:-1] + coefficients[-1]


def rank(x_N, weight_N):
    """Ranks in (0, 1) among the rows that count."""
    place = jnp.argsort(jnp.argsort(jnp.where(weight_N, x_N, jnp.inf)))
    place = (place + 0.5) / jnp.maximum(weight_N.sum(), 1)
    return jnp.where(weight_N, place, 0.5)


def uniform_per_row(key, count):
    """A random number in (0, 1) for each row, the same however many rows follow."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    return jax.vmap(jax.random.uniform)(keys)
