"""Every objective against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax import objectives
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.executors import AXIS
from tests.toy import CLASSES, random_labels

ROWS, SIZE = 8, 5


def units(rng, rows):
    x = rng.normal(size=(rows, SIZE))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def arrays(multi_label=False, seed=0):
    """Rows for every objective: names ending in _u are of the unlearn set."""
    rng = np.random.default_rng(seed)
    x = {name: units(rng, ROWS) for name in ("h_u", "h_r", "image", "text", "text_r")}
    x |= {name: rng.normal(size=(ROWS, CLASSES)) * 2 for name in ("said", "taught")}
    x |= {f"labels_{s}": random_labels(rng, ROWS, multi_label) for s in "ur"}
    x["weight_u"] = np.array([1, 1, 0, 1, 1, 1, 1, 1])
    x["weight_r"] = np.array([1, 0, 1, 1, 1, 1, 1, 0])
    x["gate_u"] = np.array([0.5, 0, 1, 1, 0.25, 2, 0, 1])
    return {name: value.astype(np.float32) for name, value in x.items()}


def both_views(x):
    return {"image": x["said"], "fused": 2 * x["said"] - 1}


def both_sets(x, u="h_u", r="h_r"):
    """Features of the unlearn and the retain rows."""
    return (
        objectives.LabeledFeatures(x[u], x["labels_u"], x["weight_u"]),
        objectives.LabeledFeatures(x[r], x["labels_r"], x["weight_r"]),
    )


OBJECTIVES = {
    "cross_entropy": lambda x, kind: objectives.cross_entropy(
        x["said"], x["labels_r"], x["weight_r"], **kind
    ),
    "divergence": lambda x, kind: objectives.kl_divergence(
        x["taught"], x["said"], x["weight_r"], temperature=3.0, **kind
    ),
    "distance": lambda x, kind: objectives.squared_distance(
        x["image"], x["text"], x["weight_u"]
    ),
    "alignment": lambda x, kind: objectives.info_nce(
        x["image"], x["text"], x["weight_u"], temperature=0.3
    ),
    "inverse_contrast": lambda x, kind: objectives.inverse_contrast(
        *both_sets(x),
        temperature=0.3,
        pull=0.7,
    ),
    "inverse_contrast_of_some": lambda x, kind: objectives.inverse_contrast(
        *both_sets(x),
        temperature=0.3,
        pull=0.7,
        gate_u=x["gate_u"],
    ),
    "inverse_contrast_of_both": lambda x, kind: objectives.inverse_contrast(
        *both_sets(x),
        temperature=0.3,
        pull=0.7,
        stop_retain_gradient=False,
    ),
    "pair_dissociation": lambda x, kind: objectives.pair_dissociation(
        x["image"],
        *both_sets(x, "text", "text_r"),
        offset=0.1,
    ),
    "pair_dissociation_two_sided": lambda x, kind: objectives.pair_dissociation(
        x["image"],
        *both_sets(x, "text", "text_r"),
        offset=0.1,
        two_sided=True,
    ),
    "retention": lambda x, kind: objectives.retention(
        {"image": x["taught"], "fused": x["taught"]},
        both_views(x),
        {"image": x["weight_r"], "fused": x["weight_r"]},
        **kind,
    ),
    "separation": lambda x, kind: objectives.separation(
        *reversed(both_sets(x)),
        temperature=0.3,
    ),
}
CONTRASTS = [name for name in OBJECTIVES if name[:5] in ("inver", "pair_", "separ")]


@functools.cache
def compiled(name, multi_label, devices):
    def step(all_rows, resident, rows):
        def value(all_rows):
            x = {key: a[rows] for key, a in all_rows.items()}
            loss = OBJECTIVES[name](x, {"multi_label": multi_label})
            return jax.lax.pmean(loss, AXIS)

        value, gradient = jax.value_and_grad(value)(all_rows)
        return all_rows, (value, jax.lax.pmean(gradient, AXIS))

    return parallel.vmap(devices).compile(step)


def measured(name, x, *, multi_label=False, devices=1):
    """Value and gradient of an objective over so many devices."""
    # The contrasts are not told: what they make of the labels is the same for both.
    multi_label &= name in ("cross_entropy", "divergence", "retention")
    rows = np.arange(len(x["said"])).reshape(devices, -1)
    value, gradient = compiled(name, multi_label, devices)(x, (), rows)[1]
    return float(value), jax.tree.map(np.asarray, gradient)


# --- the formulae once more, row by row -----------------------------------------------


def jaccard(a, b):
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def entropy_of(logits, target, multi_label):
    """Cross-entropy of one row."""
    if not multi_label:
        return -(target * scipy.special.log_softmax(logits)).sum()
    p = scipy.special.expit(logits)
    return -4 * np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))


def expected_divergence(taught, said, multi_label, t=1.0):
    squash = scipy.special.expit if multi_label else scipy.special.softmax
    rows = []
    for teacher, student in zip(taught / t, said / t, strict=True):
        p = squash(teacher)
        rows.append(
            entropy_of(student, p, multi_label) - entropy_of(teacher, p, multi_label)
        )
    return t * t * np.mean(rows)


def expected_alignment(image, text, t):
    total = []
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            e = np.exp(a[i] @ b.T / t)
            total.append(-np.log(e[i] / e.sum()) / 2)
    return 2 * np.mean(total)


def expected_inverse(h_u, h_r, labels_u, labels_r, t, pull, gate=None):
    rows = []
    gate = np.ones(len(h_u)) if gate is None else gate
    for z, own, counts in zip(h_u, labels_u, gate, strict=True):
        share = np.array([jaccard(own, other) for other in labels_r])
        if share.any():
            similar = h_r @ z / t
            away = similar[share == 0]
            near = np.log((share * np.exp(similar)).sum())
            far = away.mean() if len(away) else 0.0
            rows.append(counts * (near - pull * far))
    return np.mean(rows)


def expected_pair(image, text, text_r, labels_u, labels_r, offset, two_sided):
    rows = []
    for z, own_text, own in zip(image, text, labels_u, strict=True):
        share = np.array([jaccard(own, other) for other in labels_r])
        if share.any():
            usual = (text_r @ z * share).sum() / share.sum()
            excess = z @ own_text - usual - offset
            rows.append((excess if two_sided else max(excess, 0)) ** 2)
    return np.mean(rows)


def expected_separation(h_r, h_u, labels_r, t):
    rows = []
    for i, z in enumerate(h_r):
        others = [j for j in range(len(h_r)) if j != i]
        share = np.array([jaccard(labels_r[i], labels_r[j]) for j in others])
        if share.any():
            similar = h_r[others] @ z / t
            below = np.exp(similar).sum() + np.exp(h_u @ z / t).sum()
            log_p = similar - np.log(below)
            rows.append(-(share * log_p).sum() / share.sum())
    return np.mean(rows)


def by_hand(name, x, multi_label):
    """The value over the rows that have a weight; the others are taken out."""
    x = {key: np.asarray(value, np.float64) for key, value in x.items()}
    in_u, in_r = x["weight_u"] > 0, x["weight_r"] > 0
    u = {key: value[in_u] for key, value in x.items()}
    r = {key: value[in_r] for key, value in x.items()}
    if name == "cross_entropy":
        pairs = zip(r["said"], r["labels_r"], strict=True)
        return np.mean([entropy_of(a, b, multi_label) for a, b in pairs])
    if name == "divergence":
        return expected_divergence(r["taught"], r["said"], multi_label, 3.0)
    if name == "retention":
        return sum(
            expected_divergence(r["taught"], view, multi_label)
            for view in both_views(r).values()
        )
    if name == "alignment":
        return expected_alignment(u["image"], u["text"], 0.3)
    if name == "separation":
        return expected_separation(r["h_r"], u["h_u"], r["labels_r"], 0.3)
    if name == "distance":
        return ((u["image"] - u["text"]) ** 2).mean()
    known = (u["labels_u"], r["labels_r"])
    if name.startswith("inverse_contrast"):
        gate = u["gate_u"] if name.endswith("of_some") else None
        return expected_inverse(u["h_u"], r["h_r"], *known, 0.3, 0.7, gate)
    two_sided = name.endswith("two_sided")
    return expected_pair(u["image"], u["text"], r["text_r"], *known, 0.1, two_sided)


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_value_is_the_formula_over_the_rows_that_have_a_weight(name, multi_label):
    x = arrays(multi_label)
    value, _ = measured(name, x, multi_label=multi_label)
    assert value == pytest.approx(by_hand(name, x, multi_label), rel=1e-4, abs=1e-6)


def test_values_that_can_be_computed_in_the_head():
    two = {"said": np.zeros((1, 2)), "labels_r": np.eye(2)[:1], "weight_r": np.ones(1)}
    assert measured("cross_entropy", two)[0] == pytest.approx(np.log(2))
    multi, _ = measured("cross_entropy", two, multi_label=True)
    assert multi == pytest.approx(4 * np.log(2))
    a, b = np.array([[1.0, 1, 0]]), np.array([[1.0, 0, 1], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(
        objectives.label_similarity(a, b), [[1 / 3, 1, 0]], rtol=1e-6
    )


def test_positives_of_single_labels_are_the_rows_of_the_same_class():
    one_hot = arrays()["labels_u"]
    same = one_hot.argmax(1)[:, None] == one_hot.argmax(1)[None]
    np.testing.assert_array_equal(objectives.label_similarity(one_hot, one_hot), same)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_mean_weighs_rows_and_divides_by_their_weight(devices):
    value = np.array([1.0, 2.0, 3.0, np.inf], np.float32)
    weight = np.array([1.0, 0.5, 2.0, 0.0], np.float32)
    shares = [a.reshape(devices, -1) for a in (value, weight)]
    mean = jax.vmap(objectives.mean, axis_name=AXIS)(*shares)
    np.testing.assert_allclose(mean, np.full(devices, 8 / 3.5), rtol=1e-6)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_do_not_depend_on_the_number_of_devices(name, devices):
    x = arrays(multi_label=True)
    value, gradient = measured(name, x, multi_label=True)
    many, gradient_of_many = measured(name, x, multi_label=True, devices=devices)
    assert many == pytest.approx(value, rel=1e-5)
    for key in gradient:
        np.testing.assert_allclose(
            gradient_of_many[key], gradient[key], atol=2e-6, err_msg=key
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_the_rows_does_not_matter(name):
    x = arrays(multi_label=True)
    order = np.random.default_rng(3).permutation(ROWS)
    value, gradient = measured(name, x, multi_label=True)
    turned = {key: a[order] for key, a in x.items()}
    other, gradient_of_turned = measured(name, turned, multi_label=True)
    assert other == pytest.approx(value, rel=1e-5)
    for key in gradient:
        np.testing.assert_allclose(
            gradient_of_turned[key], gradient[key][order], atol=2e-6, err_msg=key
        )


@pytest.mark.parametrize(
    "name, moved, still",
    [
        ("inverse_contrast", "h_u", ("h_r",)),
        ("inverse_contrast_of_some", "h_u", ("h_r",)),
        ("separation", "h_r", ("h_u",)),
        ("pair_dissociation", "image", ("text", "text_r")),
        ("pair_dissociation_two_sided", "image", ("text", "text_r")),
    ],
)
def test_no_gradient_passes_where_it_is_stopped(name, moved, still):
    _, gradient = measured(name, arrays(multi_label=True), multi_label=True)
    assert np.abs(gradient[moved]).max() > 1e-3
    for key in still:
        assert not gradient[key].any(), key


def test_retained_features_move_where_they_are_not_held():
    x = arrays(multi_label=True)
    _, gradient = measured("inverse_contrast_of_both", x, multi_label=True)
    held, gradient_of_held = measured("inverse_contrast", x, multi_label=True)
    np.testing.assert_allclose(gradient["h_u"], gradient_of_held["h_u"], atol=1e-6)
    counts = x["weight_r"] > 0
    assert np.abs(gradient["h_r"][counts]).max() > 1e-3
    assert not gradient["h_r"][~counts].any()


def test_a_row_that_is_forgotten_is_pushed_no_further_and_still_counts():
    x = arrays()
    _, all_of_them = measured("inverse_contrast", x)
    _, some = measured("inverse_contrast_of_some", x)
    # As many rows in the mean: those behind a gate are not made up for by the others.
    expected = x["gate_u"][:, None] * all_of_them["h_u"]
    np.testing.assert_allclose(some["h_u"], expected, atol=1e-6)


def test_features_are_drawn_to_each_other_by_their_distance():
    x = arrays()
    _, gradient = measured("distance", x)
    weight = (x["weight_u"] / x["weight_u"].sum())[:, None]
    slope = 2 * weight * (x["image"] - x["text"]) / SIZE
    np.testing.assert_allclose(gradient["image"], slope, atol=1e-6)
    np.testing.assert_allclose(gradient["text"], -slope, atol=1e-6)


def test_a_picture_is_moved_along_its_own_text_only():
    x = arrays()
    _, gradient = measured("pair_dissociation_two_sided", x)
    weight = x["weight_u"]
    share = objectives.label_similarity(x["labels_u"], x["labels_r"]) * (
        x["weight_r"] > 0
    )
    usual = (x["image"] @ x["text_r"].T * share).sum(1) / share.sum(1)
    excess = (x["image"] * x["text"]).sum(1) - usual - 0.1
    expected = (2 * excess * weight / weight.sum())[:, None] * x["text"]
    np.testing.assert_allclose(gradient["image"], expected, atol=1e-6)


def edge_cases():
    no_positives = arrays()
    no_positives["labels_u"][:] = [1, 0, 0]
    no_positives["labels_r"][:] = [0, 1, 0]
    no_positives["labels_r"][3] = [0, 0, 1]
    # One row of either class has a weight, so none of them has another of its class.
    no_positives["weight_r"][:] = [1, 0, 0, 1, 0, 0, 0, 0]
    no_weight = arrays()
    no_weight["weight_u"][:] = no_weight["weight_r"][:] = 0
    no_retain = arrays() | {"weight_r": np.zeros(ROWS, np.float32)}
    no_unlearn = arrays() | {"weight_u": np.zeros(ROWS, np.float32)}
    identical = {key: np.repeat(a[:1], ROWS, axis=0) for key, a in arrays().items()}
    return {
        "no positives": no_positives,
        "no weight": no_weight,
        "no retain rows": no_retain,
        "no unlearn rows": no_unlearn,
        "identical rows": identical,
        "huge logits": arrays() | {"said": arrays()["said"] * 1e4},
        "huge logits of the teacher": arrays() | {"taught": arrays()["taught"] * 1e4},
        "one row": {key: a[:1] for key, a in arrays().items()},
    }


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_finite_in_every_corner(name, multi_label):
    for case, x in edge_cases().items():
        value, gradient = measured(name, x, multi_label=multi_label)
        assert np.isfinite(value), case
        for key in gradient:
            assert np.isfinite(gradient[key]).all(), (case, key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_contrast_means_zero_and_no_gradient(name):
    cases = edge_cases()
    # The inverse contrast pulls at rows that it has nothing to push off: tested below.
    pulls = name.startswith("inverse")
    names = ["no weight"] + ["no positives"] * (name in CONTRASTS and not pulls)
    for case in names:
        value, gradient = measured(name, cases[case])
        assert value == 0, case
        assert not any(g.any() for g in gradient.values()), case


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_rows_without_weight_hold_does_not_matter(name):
    x = arrays(multi_label=True)
    value, gradient = measured(name, x, multi_label=True)
    other = {key: a.copy() for key, a in x.items()}
    # Rows of one set without weight, where the objective reads only that set's weight.
    of_u = {"inverse_contrast": ("h_u", "labels_u"), "separation": ("h_u",)}
    of_r = {
        "inverse_contrast": ("h_r", "labels_r"),
        "separation": ("h_r", "labels_r"),
        "alignment": (),
        "distance": (),
    }
    pair = name.startswith("pair_")
    kind = name.partition("_of_")[0]
    of_u = of_u.get(kind, ("image", "text", "labels_u") if pair else ("image", "text"))
    other_r = ("text_r", "labels_r") if pair else ("said", "taught", "labels_r")
    of_r = of_r.get(kind, other_r)
    for key in of_u:
        other[key][x["weight_u"] == 0] = 1.0 if "labels" in key else 7.0
    for key in of_r:
        other[key][x["weight_r"] == 0] = 1.0 if "labels" in key else 7.0
    changed, gradient_of_other = measured(name, other, multi_label=True)
    assert changed == value
    for key in gradient:
        np.testing.assert_array_equal(gradient_of_other[key], gradient[key], key)


def test_the_level_objective_is_quadratic_near_its_target_and_linear_far_off():
    value, target = jnp.array([1.0, 0.0, 5.0, 9.0]), jnp.array([1.5, 0.0, 2.0, 0.0])
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    run = jax.vmap(
        objectives.match_confidence,
        in_axes=None,
        out_axes=None,
        axis_name=AXIS,
        axis_size=1,
    )
    assert float(run(value, target, weight)) == pytest.approx((0.125 + 0 + 2.5) / 3)
    slope = jax.grad(lambda v: run(v, target, weight))(value)
    np.testing.assert_allclose(slope, [-0.5 / 3, 0, 1 / 3, 0], atol=1e-6)
    assert not jax.grad(lambda t: run(value, t, weight))(target).any()


def test_a_row_whose_class_nobody_retains_is_pulled_and_not_pushed():
    """As Lee et al. (2024) have it where a whole class is to be forgotten."""
    h_u = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    h_r = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    labels_u, labels_r = jnp.eye(3)[jnp.array([2, 2])], jnp.eye(3)[jnp.array([0, 1])]
    ones = jnp.ones(2)

    def loss(pull):
        fn = functools.partial(
            objectives.inverse_contrast, temperature=0.5, pull=jnp.float32(pull)
        )
        mapped = jax.vmap(
            lambda *x: fn(*x), in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1
        )
        return float(
            mapped(
                objectives.LabeledFeatures(h_u, labels_u, ones),
                objectives.LabeledFeatures(h_r, labels_r, ones),
            )
        )

    near = (h_u @ h_r.T / 0.5).mean(axis=1)
    assert loss(1.0) == pytest.approx(-float(near.mean()), rel=1e-5)
    assert loss(0.0) == 0
