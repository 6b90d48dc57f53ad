"""The targets of the closed loop, and the statistics that they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax.methods.ccu import confidence, targets
from ccu_jax.methods.ccu import masked_statistics as statistics
from tests.toy import CLASSES, random_labels

KINDS = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])

prepare = jax.jit(targets.fit_prior, static_argnames=("strength", "multi_label"))
current = jax.jit(targets.update_targets, static_argnames=("gain", "multi_label"))
with_confidence = jax.jit(confidence.with_confidence, static_argnames="multi_label")


def all_of(rows):
    """Weights of so many rows that all count."""
    return jnp.ones(rows, bool)


def confidence_of(probability, truth, multi_label):
    """`g` of probabilities, in NumPy."""
    p = np.asarray(probability, np.float64)
    if multi_label:
        total = np.log(np.where(truth > 0, p, 1 - p)).sum(1)
    else:
        total = np.log((p * truth).sum(1))
    return -np.log(-total)


@KINDS
def test_confidence_is_the_logarithm_of_the_log_loss(multi_label):
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(6, CLASSES)), random_labels(rng, 6, multi_label)
    squash = (
        scipy.special.expit
        if multi_label
        else functools.partial(scipy.special.softmax, axis=1)
    )
    np.testing.assert_allclose(
        confidence.confidence(logits, truth, multi_label=multi_label),
        confidence_of(squash(logits), truth, multi_label),
        rtol=1e-5,
    )


@KINDS
def test_targets_have_exactly_the_confidence_that_is_asked_for(multi_label):
    rng = np.random.default_rng(1)
    base, truth = 2 * rng.normal(size=(9, CLASSES)), random_labels(rng, 9, multi_label)
    g = np.linspace(-2.5, 3.5, 9)
    p = np.asarray(with_confidence(base, truth, g, multi_label=multi_label))
    np.testing.assert_allclose(confidence_of(p, truth, multi_label), g, atol=1e-3)
    assert (p >= 0).all() and (p <= 1).all()
    if not multi_label:
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
        # What is left is divided as `base` would have it.
        rest = np.where(truth > 0, -np.inf, base)
        left = 1 - (p * truth).sum(1, keepdims=True)
        rest = left * scipy.special.softmax(rest, axis=1)
        np.testing.assert_allclose(p * (1 - truth), rest, atol=1e-6)


def test_ranks_are_evenly_spaced_between_0_and_1():
    found = statistics.rank(jnp.array([5.0, -1.0, 9.0, 0.0]), all_of(4))
    np.testing.assert_allclose(found, [0.625, 0.125, 0.875, 0.375])


def test_places_among_other_values_are_counted_with_ties_half():
    found = statistics.ecdf(
        jnp.array([0.0, 2.0, 9.0]), jnp.array([3.0, 1, 2, 2]), all_of(4)
    )
    np.testing.assert_allclose(found, np.array([0.5, 2.5, 4.5]) / 5, rtol=1e-6)


def test_hits_and_margins_by_hand():
    scores = jnp.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.9], [0.5, 0.4, 0.3]])
    several = jnp.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]])
    np.testing.assert_allclose(confidence.recall_at_k(scores, several), [0.5, 1, 0])
    # Of several labels: the confidence, with scores as probabilities of 0.02 to 0.98.
    expected = confidence_of(scores, np.asarray(several), multi_label=True)
    found = confidence.margin(scores, several, multi_label=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sure = confidence.margin(jnp.array([[2.0, -1.0]]), jnp.eye(2)[:1], multi_label=True)
    np.testing.assert_allclose(sure, -np.log(-2 * np.log(0.98)), rtol=1e-4)
    one = jnp.eye(3)
    np.testing.assert_allclose(
        confidence.margin(scores, one, multi_label=False), [0.4, -0.6, -0.2], atol=1e-6
    )
    # A row with more labels than the classes that score high keeps its share.
    np.testing.assert_allclose(confidence.recall_at_k(scores, one), [1, 0, 0])


def test_a_line_is_fitted_by_least_squares():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(50, 2))
    y = jnp.array(x @ [2.0, -1.0] + 0.5)
    line = statistics.fit_line(jnp.array(x), y, all_of(50))
    np.testing.assert_allclose(line, [2, -1, 0.5], atol=1e-3)
    np.testing.assert_allclose(statistics.predict_line(line, x), y, atol=1e-3)


def toy_rows(rng, rows, multi_label, only=None):
    """Rows whose features and logits tell their labels, with noise."""
    truth = random_labels(rng, rows, multi_label)
    if only is not None:
        truth = np.eye(CLASSES)[np.full(rows, only)]
    features = np.concatenate([truth, np.zeros((rows, 3))], axis=1)
    features += 0.5 * rng.normal(size=features.shape)
    views = {
        view: 3 * truth - 1.5 + rng.normal(size=truth.shape)
        for view in ("image", "text", "fused")
    }
    plain = features + rng.normal(size=features.shape)  # an untrained trunk knows less
    x = {"pooled": features, "fresh": plain, "labels": truth, **views}
    x = {key: jnp.asarray(value, jnp.float32) for key, value in x.items()}
    return x | {"valid": all_of(rows)}


NO_BIAS = {"image": jnp.zeros(()), "fused": jnp.zeros(())}


def test_a_trunk_that_knows_rows_by_heart_does_not_make_them_look_easy():
    rng = np.random.default_rng(6)
    u, v, r = (toy_rows(rng, n, False) for n in (60, 200, 300))
    known = {**u, "pooled": u["pooled"].at[:, :CLASSES].set(4 * u["labels"])}
    kind = {"strength": 0.1, "multi_label": False}
    plain, biased = (prepare(x, v, r, jax.random.key(0), **kind) for x in (u, known))
    np.testing.assert_allclose(np.sort(plain.image_rank), np.sort(biased.image_rank))
    assert abs(biased.image_rank.mean() - 0.5) < 0.12


@KINDS
def test_the_lead_grows_until_the_targets_are_met(multi_label):
    rng = np.random.default_rng(7)
    kind = {"multi_label": multi_label}
    u, v, r = (toy_rows(rng, n, multi_label) for n in (60, 200, 300))
    ranks = prepare(u, v, r, jax.random.key(0), strength=0.1, **kind)
    aims = current(ranks, u, v, NO_BIAS, gain=0.5, **kind)

    def followed(aims, offset):
        """A model that says the targets, but always a little surer than asked."""
        said = {}
        for view in ("image", "fused"):
            p = with_confidence(
                u[view], u["labels"], aims.confidence[view] + offset, **kind
            )
            said[view] = jax.scipy.special.logit(p) if multi_label else jnp.log(p)
        return {**u, **said}

    def above(aims, offset):
        said = followed(aims, offset)
        free = current(ranks, said, v, NO_BIAS, gain=1.0, **kind).bias
        return np.array([float(free[view]) for view in ("image", "fused")])

    before = above(aims, 0.5)
    for _ in range(40):
        said = followed(aims, 0.5)
        aims = current(ranks, said, v, aims.bias, gain=0.5, **kind)
    assert (before > 0.05).all()
    assert (np.abs(above(aims, 0.5)) < 0.3 * before).all()


def test_a_value_is_taken_from_one_of_the_nearest_rows():
    x_v = jnp.array([3.0, 0.0, 1.0, 2.0, *range(4, 24)])
    of = x_v, 10 * x_v, all_of(24)
    found = targets.nearest_value(jnp.array([1.9, -5.0, 99.0]), *of, jnp.full(3, 0.5))
    np.testing.assert_allclose(found, [20, 0, 230])
    low = targets.nearest_value(jnp.array([9.5]), *of, jnp.array([0.01]))
    high = targets.nearest_value(jnp.array([9.5]), *of, jnp.array([0.99]))
    assert 80 <= low[0] < high[0] <= 110


@KINDS
def test_targets_of_rows_like_any_other_look_like_held_out_rows(multi_label):
    rng = np.random.default_rng(4)
    rows = 40
    u, v, r = (toy_rows(rng, n, multi_label) for n in (rows, rows, 200))
    kind = {"multi_label": multi_label}
    ranks = prepare(u, v, r, jax.random.key(0), strength=0.1, **kind)
    assert not ranks.is_shifted
    for name in ("image_rank", "fused_rank"):
        in_order = np.sort(getattr(ranks, name))
        assert in_order[0] > 0 and in_order[-1] < 1
        # As far from evenly spaced as two samples of so many rows may be.
        assert np.abs(in_order - (np.arange(rows) + 0.5) / rows).max() < 0.3
    now = {view: 1.5 * v[view] + 0.3 for view in ("image", "fused")}
    aims = current(ranks, u, {**v, **now}, NO_BIAS, gain=0.0, **kind)
    held_out = np.asarray(confidence.confidence(now["image"], v["labels"], **kind))
    got = confidence_of(aims.probability["image"], np.asarray(u["labels"]), multi_label)
    np.testing.assert_allclose(got, np.quantile(held_out, ranks.image_rank), atol=2e-3)
    for view in ("image", "fused"):
        held_out = np.asarray(confidence.confidence(now[view], v["labels"], **kind))
        got = confidence_of(
            aims.probability[view], np.asarray(u["labels"]), multi_label
        )
        error = held_out.std() * np.sqrt(2 / rows)
        assert abs(got.mean() - held_out.mean()) < 3 * error, view
        assert 0.6 < got.std() / held_out.std() < 1.6, view


@KINDS
def test_a_class_that_nobody_retains_is_denied_by_the_picture(multi_label):
    rng = np.random.default_rng(5)
    gone = 2
    u, v, r = (
        toy_rows(rng, 20, multi_label, only=gone),
        toy_rows(rng, 40, multi_label),
        toy_rows(rng, 200, multi_label),
    )
    keep = np.flatnonzero(np.asarray(r["labels"])[:, gone] == 0)
    r = {key: value[keep] for key, value in r.items()}
    kind = {"multi_label": multi_label}
    ranks = prepare(u, v, r, jax.random.key(0), strength=0.1, **kind)
    assert ranks.is_shifted
    aims = current(ranks, u, v, NO_BIAS, gain=0.5, **kind)
    assert np.asarray(aims.probability["image"])[:, gone].max() < 1e-3
    # The text was not asked to be forgotten, so it still may say yes.
    assert np.asarray(aims.probability["fused"])[:, gone].mean() > 0.3
    assert all(np.isfinite(aim).all() for aim in jax.tree.leaves(aims))


# --- rows that fill up a table --------------------------------------------------------


def filled_up(x, size, fill):
    """The same rows, and after them others that do not count."""
    rng = np.random.default_rng(11)

    def more(a):
        extra = np.zeros((size - len(a), *a.shape[1:]), np.float32)
        if fill == "anything":
            extra += 40 * rng.normal(size=extra.shape).astype(np.float32)
        return jnp.concatenate([a, extra])

    counts = jnp.arange(size) < len(x["valid"])
    return {key: more(a) for key, a in x.items() if key != "valid"} | {"valid": counts}


FILLS = pytest.mark.parametrize("fill", ["zeros", "anything"])


def scattered(rng, rows, junk=50.0):
    """Values, some of which do not count and are far off, and which do."""
    weight = rng.random(rows) < 0.6
    weight[0], weight[-1] = True, False
    value = rng.normal(size=rows).astype(np.float32)
    value[~weight] = junk * rng.normal(size=(~weight).sum())
    return value, weight


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 101])
def test_weighted_quantiles_are_those_of_numpy(rows):
    rng = np.random.default_rng(rows)
    value, weight = scattered(rng, 2 * rows)
    weight[np.flatnonzero(weight)[rows:]] = False
    share = np.array([0.0, 1.0, 0.5, *rng.random(9)], np.float32)
    found = statistics.quantile(share, value, weight)
    np.testing.assert_allclose(found, np.quantile(value[weight], share), atol=1e-5)
    whole = statistics.quantile(share, value[weight], all_of(weight.sum()))
    np.testing.assert_array_equal(found, whole)


def test_statistics_are_those_of_the_rows_that_count():
    rng = np.random.default_rng(8)
    value, weight = scattered(rng, 60)
    kept, count = value[weight], weight.sum()
    every = all_of(count)
    mean, spread = statistics.mean(value, weight), statistics.std(value, weight)
    np.testing.assert_allclose([mean, spread], [kept.mean(), kept.std()], rtol=1e-5)
    in_order = np.asarray(statistics.sort_valid(value, weight))
    np.testing.assert_array_equal(in_order[:count], np.sort(kept))
    assert np.isinf(in_order[count:]).all()
    ranks = np.asarray(statistics.rank(value, weight))
    np.testing.assert_allclose(ranks[weight], statistics.rank(kept, every), rtol=1e-6)
    assert ((ranks > 0) & (ranks < 1)).all()
    x = np.array([*rng.normal(size=9), *kept[:3]], np.float32)
    np.testing.assert_array_equal(
        statistics.ecdf(x, value, weight),
        statistics.ecdf(x, kept, every),
    )
    predictors = 9 * rng.normal(size=(60, 2)).astype(np.float32)
    np.testing.assert_allclose(
        statistics.fit_line(predictors, value, weight),
        statistics.fit_line(predictors[weight], kept, every),
        atol=1e-5,
    )
    choice = rng.random(12).astype(np.float32)
    np.testing.assert_array_equal(
        targets.nearest_value(x, value, 2 * value, weight, choice),
        targets.nearest_value(x, kept, 2 * kept, every, choice),
    )
    none = np.zeros(60, bool)
    assert statistics.mean(value, none) == statistics.std(value, none) == 0


def test_what_is_drawn_for_a_row_does_not_depend_on_how_many_follow():
    key = jax.random.key(3)
    few, many = statistics.uniform_per_row(key, 5), statistics.uniform_per_row(key, 400)
    np.testing.assert_array_equal(few, many[:5])
    assert len(set(many.tolist())) == 400 and abs(many.mean() - 0.5) < 0.05


@KINDS
@FILLS
def test_rows_that_fill_up_a_table_change_no_rank_and_no_target(multi_label, fill):
    rng = np.random.default_rng(10)
    kind = {"multi_label": multi_label}
    plain = [toy_rows(rng, n, multi_label) for n in (21, 43, 97)]
    full = [filled_up(x, n, fill) for x, n in zip(plain, (32, 44, 128), strict=True)]

    def both(u, v, r):
        prepared = prepare(u, v, r, jax.random.key(0), strength=0.1, **kind)
        lead = {"image": jnp.float32(0.2), "fused": jnp.float32(-0.1)}
        now = {view: 1.5 * u[view] + 0.3 for view in ("image", "fused")}
        aims = current(prepared, {**u, **now}, v, lead, gain=0.5, **kind)
        return {**prepared._asdict(), **aims._asdict()}

    expected, found = both(*plain), both(*full)
    for x in jax.tree.leaves(found):
        assert np.isfinite(x).all()
    assert found.pop("is_shifted") == expected.pop("is_shifted")
    np.testing.assert_array_equal(found.pop("is_retained"), expected.pop("is_retained"))

    def same(path, a, b):
        a = a[: len(b)] if b.ndim else a
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, found, expected)


@FILLS
def test_whether_a_whole_class_is_forgotten_is_seen_in_a_filled_up_table(fill):
    rng = np.random.default_rng(5)
    u, v, r = (
        toy_rows(rng, 20, False, only=2),
        *(toy_rows(rng, n, False) for n in (40, 200)),
    )
    keep = np.flatnonzero(np.asarray(r["labels"])[:, 2] == 0)
    r = {key: value[keep] for key, value in r.items()}
    full = [filled_up(x, n, fill) for x, n in ((u, 24), (v, 40), (r, 144))]
    ranks = prepare(*full, jax.random.key(0), strength=0.1, multi_label=False)
    assert ranks.is_shifted and ranks.is_retained.tolist() == [True, True, False]
