"""The targets of the closed loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.methods.ccu import targets
from ccu_jax.methods.ccu.statistics import confidence, probabilities_at_confidence
from ccu_jax.models import VISUAL
from tests.methods.ccu.test_statistics import each_label_kind, expected_confidence
from tests.toy import CLASSES, random_labels

NO_BIAS = dict.fromkeys(VISUAL, jnp.zeros(()))


def fit_prior(u, v, r, multi_label):
    fit = jax.jit(targets.fit_prior, static_argnames=("strength", "multi_label"))
    return fit(u, v, r, jax.random.key(0), strength=0.1, multi_label=multi_label)


def update_targets(prior, u, v, bias, gain, multi_label):
    update = jax.jit(targets.update_targets, static_argnames=("gain", "multi_label"))
    return update(prior, u, v, bias, gain=gain, multi_label=multi_label)


def make_rows(rng, num_rows, multi_label, only=None):
    """Rows whose features and logits depend on their labels, with noise."""
    labels = random_labels(rng, num_rows, multi_label)
    if only is not None:
        labels = np.eye(CLASSES)[np.full(num_rows, only)]
    features = np.concatenate([labels, np.zeros((num_rows, 3))], axis=1)
    features += 0.5 * rng.normal(size=features.shape)
    rows = {
        view: 3 * labels - 1.5 + rng.normal(size=labels.shape)
        for view in ("image", "text", "fused")
    }
    fresh = features + rng.normal(size=features.shape)
    rows |= {"pooled": features, "fresh": fresh, "labels": labels}
    rows = {key: jnp.asarray(value, jnp.float32) for key, value in rows.items()}
    return rows | {"valid": jnp.ones(num_rows, bool)}


def without_class(rows, label):
    rows_left = np.flatnonzero(np.asarray(rows["labels"])[:, label] == 0)
    return {key: value[rows_left] for key, value in rows.items()}


def pad(rows, size, fill):
    """Appends invalid rows of zeros or of large numbers."""
    rng = np.random.default_rng(11)

    def append(a):
        extra = rng.normal(size=(size - len(a), *a.shape[1:])).astype(np.float32)
        return jnp.concatenate([a, (0 if fill == "zeros" else 40) * extra])

    valid = jnp.arange(size) < len(rows["valid"])
    return {key: append(a) for key, a in rows.items()} | {"valid": valid}


def test_memorized_features_do_not_raise_the_ranks():
    rng = np.random.default_rng(6)
    u, v, r = (make_rows(rng, n, False) for n in (60, 200, 300))
    memorized = {**u, "pooled": u["pooled"].at[:, :CLASSES].set(4 * u["labels"])}
    plain, biased = (fit_prior(x, v, r, False).image_rank for x in (u, memorized))
    np.testing.assert_allclose(np.sort(plain), np.sort(biased))
    assert abs(biased.mean() - 0.5) < 0.12


@each_label_kind
def test_bias_grows_until_the_targets_are_met(multi_label):
    rng = np.random.default_rng(7)
    u, v, r = (make_rows(rng, n, multi_label) for n in (60, 200, 300))
    prior = fit_prior(u, v, r, multi_label)

    def follow(found):
        """Rows of a model that is always a little above its targets."""
        logits = {}
        for view in VISUAL:
            g = found.confidence[view] + 0.5
            p = probabilities_at_confidence(u[view], u["labels"], g, multi_label)
            logits[view] = jax.scipy.special.logit(p) if multi_label else jnp.log(p)
        return {**u, **logits}

    def excess(found):
        bias = update_targets(prior, follow(found), v, NO_BIAS, 1.0, multi_label).bias
        return np.array([float(bias[view]) for view in VISUAL])

    found = update_targets(prior, u, v, NO_BIAS, 0.5, multi_label)
    before = excess(found)
    for _ in range(40):
        found = update_targets(prior, follow(found), v, found.bias, 0.5, multi_label)
    assert (before > 0.05).all()
    assert (np.abs(excess(found)) < 0.3 * before).all()


def test_nearest_value_takes_one_of_the_nearest_rows():
    x_v = jnp.array([3.0, 0.0, 1.0, 2.0, *range(4, 24)])
    rows_v = x_v, 10 * x_v, jnp.ones(24, bool)
    x_u = jnp.array([1.9, -5.0, 99.0])
    found = targets.sample_nearest_value(x_u, *rows_v, jnp.full(3, 0.5))
    np.testing.assert_allclose(found, [20, 0, 230])
    low, high = (
        targets.sample_nearest_value(jnp.array([9.5]), *rows_v, jnp.array([choice]))[0]
        for choice in (0.01, 0.99)
    )
    assert 80 <= low < high <= 110


@each_label_kind
def test_targets_are_distributed_like_heldout_confidences(multi_label):
    rng, num_rows = np.random.default_rng(4), 40
    u, v, r = (make_rows(rng, n, multi_label) for n in (num_rows, num_rows, 200))
    prior = fit_prior(u, v, r, multi_label)
    assert not prior.is_shifted
    for ranks in (prior.image_rank, prior.fused_rank):
        in_order = np.sort(ranks)
        assert in_order[0] > 0 and in_order[-1] < 1
        # As far from evenly spaced as two samples of this size may be.
        expected = (np.arange(num_rows) + 0.5) / num_rows
        assert np.abs(in_order - expected).max() < 0.3
    current = {**v, **{view: 1.5 * v[view] + 0.3 for view in VISUAL}}
    found = update_targets(prior, u, current, NO_BIAS, 0.0, multi_label)
    for view in VISUAL:
        heldout = np.asarray(confidence(current[view], v["labels"], multi_label))
        labels = np.asarray(u["labels"])
        g = expected_confidence(found.probability[view], labels, multi_label)
        if view == "image":
            expected = np.quantile(heldout, prior.image_rank)
            np.testing.assert_allclose(g, expected, atol=2e-3)
        error = heldout.std() * np.sqrt(2 / num_rows)
        assert abs(g.mean() - heldout.mean()) < 3 * error, view
        assert 0.6 < g.std() / heldout.std() < 1.6, view


@each_label_kind
def test_image_targets_deny_a_class_that_is_not_retained(multi_label):
    rng = np.random.default_rng(5)
    u = make_rows(rng, 20, multi_label, only=2)
    v, r = (make_rows(rng, n, multi_label) for n in (40, 200))
    prior = fit_prior(u, v, without_class(r, 2), multi_label)
    assert prior.is_shifted
    found = update_targets(prior, u, v, NO_BIAS, 0.5, multi_label)
    assert np.asarray(found.probability["image"])[:, 2].max() < 1e-3
    # The text does not have to be unlearned.
    assert np.asarray(found.probability["fused"])[:, 2].mean() > 0.3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@each_label_kind
@pytest.mark.parametrize("fill", ["zeros", "anything"])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_padding_changes_no_prior_and_no_target(multi_label, fill, is_shifted):
    rng = np.random.default_rng(10)
    u = make_rows(rng, 21, multi_label, only=2 if is_shifted else None)
    v, r = (make_rows(rng, n, multi_label) for n in (43, 97))
    r = without_class(r, 2) if is_shifted else r
    rows = [u, v, r]
    padded = [pad(x, size, fill) for x, size in zip(rows, (32, 44, 128), strict=True)]

    def estimate(u, v, r):
        prior = fit_prior(u, v, r, multi_label)
        bias = {"image": jnp.float32(0.2), "fused": jnp.float32(-0.1)}
        current = {**u, **{view: 1.5 * u[view] + 0.3 for view in VISUAL}}
        return prior, update_targets(prior, current, v, bias, 0.5, multi_label)

    expected, found = estimate(*rows), estimate(*padded)
    assert bool(found[0].is_shifted) == is_shifted

    def check(path, a, b):
        assert np.isfinite(a).all()
        a = a[: len(b)] if b.ndim else a
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, found, expected)
