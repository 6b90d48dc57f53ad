"""Every objective against its formula in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ccu_jax import objectives
from ccu_jax.distributed import executors
from ccu_jax.distributed.executors import AXIS
from ccu_jax.objectives import LabeledFeatures
from tests.toy import CLASSES, on_one_device, random_labels

NUM_ROWS, SIZE = 8, 5


def make_arrays(multi_label=False):
    """Returns inputs of all objectives; suffixes u and r: unlearn and retain rows."""
    rng = np.random.default_rng(0)
    x = {}
    for name in ("h_u", "h_r", "image", "text", "text_r"):
        features = rng.normal(size=(NUM_ROWS, SIZE))
        x[name] = features / np.linalg.norm(features, axis=1, keepdims=True)
    for name in ("student", "teacher"):
        x[name] = rng.normal(size=(NUM_ROWS, CLASSES)) * 2
    x |= {f"labels_{s}": random_labels(rng, NUM_ROWS, multi_label) for s in "ur"}
    x["weight_u"] = np.array([1, 1, 0, 1, 1, 1, 1, 1])
    x["weight_r"] = np.array([1, 0, 1, 1, 1, 1, 1, 0])
    x["gate_u"] = np.array([0.5, 0, 1, 1, 0.25, 2, 0, 1])
    return {name: value.astype(np.float32) for name, value in x.items()}


def make_sets(x, u="h_u", r="h_r"):
    return (
        LabeledFeatures(x[u], x["labels_u"], x["weight_u"]),
        LabeledFeatures(x[r], x["labels_r"], x["weight_r"]),
    )


def inverse_contrast(x, **options):
    options = {"temperature": 0.3, "pull": 0.7} | options
    return objectives.inverse_contrast(*make_sets(x), **options)


def pair_dissociation(x, **options):
    sets = make_sets(x, "text", "text_r")
    return objectives.pair_dissociation(x["image"], *sets, offset=0.1, **options)


def by_view(x):
    return {"image": x["student"], "fused": 2 * x["student"] - 1}


# Functions of the arrays and of whether rows have several labels.
OBJECTIVES = {
    "cross_entropy": lambda x, m: objectives.cross_entropy(
        x["student"], x["labels_r"], x["weight_r"], multi_label=m
    ),
    "kl_divergence": lambda x, m: objectives.kl_divergence(
        x["teacher"], x["student"], x["weight_r"], temperature=3.0, multi_label=m
    ),
    "retention": lambda x, m: objectives.retention(
        *(dict.fromkeys(by_view(x), x["teacher"]), by_view(x)),
        dict.fromkeys(by_view(x), x["weight_r"]),
        multi_label=m,
    ),
    "squared_distance": lambda x, m: objectives.squared_distance(
        x["image"], x["text"], x["weight_u"]
    ),
    "info_nce": lambda x, m: objectives.info_nce(
        x["image"], x["text"], x["weight_u"], temperature=0.3
    ),
    "inverse_contrast": lambda x, m: inverse_contrast(x),
    "inverse_contrast_gated": lambda x, m: inverse_contrast(x, gate_u=x["gate_u"]),
    "inverse_contrast_both": lambda x, m: inverse_contrast(
        x, stop_retain_gradient=False
    ),
    "pair_dissociation": lambda x, m: pair_dissociation(x),
    "pair_dissociation_two_sided": lambda x, m: pair_dissociation(x, two_sided=True),
    "separation": lambda x, m: objectives.separation(
        *reversed(make_sets(x)), temperature=0.3
    ),
}
USES_MULTI_LABEL = ("cross_entropy", "kl_divergence", "retention")
each_objective = pytest.mark.parametrize("name", OBJECTIVES)
each_label_kind = pytest.mark.parametrize(
    "multi_label", [False, True], ids=["single", "multi"]
)


@functools.cache
def compile_step(name, multi_label, num_devices):
    def step(all_rows, _, rows):
        def value(all_rows):
            x = {key: a[rows] for key, a in all_rows.items()}
            return jax.lax.pmean(OBJECTIVES[name](x, multi_label), AXIS)

        value, gradient = jax.value_and_grad(value)(all_rows)
        return all_rows, (value, jax.lax.pmean(gradient, AXIS))

    return executors.vmap(num_devices).compile(step)


def value_and_gradient(name, x, *, multi_label=False, num_devices=1):
    multi_label &= name in USES_MULTI_LABEL
    rows = np.arange(len(x["student"])).reshape(num_devices, -1)
    value, gradient = compile_step(name, multi_label, num_devices)(x, (), rows)[1]
    return float(value), jax.tree.map(np.asarray, gradient)


def shares_of(labels, others):
    """Returns the Jaccard similarity of a row's labels and those of each other row."""
    return np.minimum(labels, others).sum(1) / np.maximum(labels, others).sum(1)


def row_cross_entropy(logits, target, multi_label):
    if not multi_label:
        return -(target * scipy.special.log_softmax(logits)).sum()
    p = scipy.special.expit(logits)
    return -4 * np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))


def expected_kl(teacher, student, multi_label, t=1.0):
    normalize = scipy.special.expit if multi_label else scipy.special.softmax
    rows = [
        row_cross_entropy(b, normalize(a), multi_label)
        - row_cross_entropy(a, normalize(a), multi_label)
        for a, b in zip(teacher / t, student / t, strict=True)
    ]
    return t * t * np.mean(rows)


def expected_info_nce(image, text, t):
    logits = image @ text.T / t
    directions = (scipy.special.log_softmax(x, axis=1) for x in (logits, logits.T))
    return -np.mean([np.diag(log_p) for log_p in directions])


def expected_inverse(u, r, gate, t=0.3, pull=0.7):
    rows = []
    for h, labels, factor in zip(u["h_u"], u["labels_u"], gate, strict=True):
        share = shares_of(labels, r["labels_r"])
        if share.any():
            logits = r["h_r"] @ h / t
            others = logits[share == 0]
            push = np.log((share * np.exp(logits)).sum())
            rows.append(factor * (push - pull * (others.mean() if len(others) else 0)))
    return np.mean(rows)


def expected_pair(u, r, two_sided, offset=0.1):
    rows = []
    for z, text, labels in zip(u["image"], u["text"], u["labels_u"], strict=True):
        share = shares_of(labels, r["labels_r"])
        if share.any():
            class_mean = (r["text_r"] @ z * share).sum() / share.sum()
            excess = z @ text - class_mean - offset
            rows.append((excess if two_sided else max(excess, 0)) ** 2)
    return np.mean(rows)


def expected_separation(h_r, h_u, labels_r, t=0.3):
    rows = []
    for i, h in enumerate(h_r):
        others = [j for j in range(len(h_r)) if j != i]
        share = shares_of(labels_r[i], labels_r[others])
        if share.any():
            logits = h_r[others] @ h / t
            log_p = logits - np.log(np.exp(logits).sum() + np.exp(h_u @ h / t).sum())
            rows.append(-(share * log_p).sum() / share.sum())
    return np.mean(rows)


def expected_value(name, x, multi_label):
    """Evaluates the formula on the rows with nonzero weight."""
    x = {key: np.asarray(value, np.float64) for key, value in x.items()}
    u = {key: value[x["weight_u"] > 0] for key, value in x.items()}
    r = {key: value[x["weight_r"] > 0] for key, value in x.items()}
    gate = u["gate_u"] if name.endswith("gated") else np.ones(len(u["h_u"]))
    pairs = zip(r["student"], r["labels_r"], strict=True)
    formulas = {
        "cross_entropy": lambda: np.mean(
            [row_cross_entropy(a, b, multi_label) for a, b in pairs]
        ),
        "kl_divergence": lambda: expected_kl(
            r["teacher"], r["student"], multi_label, 3.0
        ),
        "retention": lambda: sum(
            expected_kl(r["teacher"], logits, multi_label)
            for logits in by_view(r).values()
        ),
        "squared_distance": lambda: np.mean((u["image"] - u["text"]) ** 2),
        "info_nce": lambda: expected_info_nce(u["image"], u["text"], 0.3),
        "inverse_contrast": lambda: expected_inverse(u, r, gate),
        "pair_dissociation": lambda: expected_pair(u, r, name.endswith("two_sided")),
        "separation": lambda: expected_separation(r["h_r"], u["h_u"], r["labels_r"]),
    }
    return next(formulas[key]() for key in formulas if name.startswith(key))


@each_label_kind
@each_objective
def test_value_equals_formula(name, multi_label):
    x = make_arrays(multi_label)
    value, _ = value_and_gradient(name, x, multi_label=multi_label)
    assert value == pytest.approx(expected_value(name, x, multi_label), rel=1e-4)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_mean_divides_by_the_weight_of_all_devices(num_devices):
    value = jnp.array([1.0, 2.0, 3.0, np.inf])
    weight = jnp.array([1.0, 0.5, 2.0, 0.0])
    shards = [a.reshape(num_devices, -1) for a in (value, weight)]
    mean = jax.vmap(objectives.mean, axis_name=AXIS)(*shards)
    np.testing.assert_allclose(mean, np.full(num_devices, 8 / 3.5), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [2, 4])
@each_objective
def test_devices_and_order_of_rows_do_not_matter(name, num_devices):
    x = make_arrays(multi_label=True)
    order = np.random.default_rng(3).permutation(NUM_ROWS)
    value, gradient = value_and_gradient(name, x, multi_label=True)
    shuffled = {key: a[order] for key, a in x.items()}
    options = {"multi_label": True, "num_devices": num_devices}
    found, gradient_by_key = value_and_gradient(name, shuffled, **options)
    assert found == pytest.approx(value, rel=1e-5)
    for key, g in gradient.items():
        np.testing.assert_allclose(gradient_by_key[key], g[order], atol=2e-6)


@pytest.mark.parametrize(
    "name, moved, stopped",
    [
        ("inverse_contrast", "h_u", ("h_r",)),
        ("inverse_contrast_gated", "h_u", ("h_r",)),
        ("inverse_contrast_both", "h_r", ()),
        ("separation", "h_r", ("h_u",)),
        ("pair_dissociation", "image", ("text", "text_r")),
        ("pair_dissociation_two_sided", "image", ("text", "text_r")),
    ],
)
def test_stop_gradients(name, moved, stopped):
    x = make_arrays(multi_label=True)
    _, gradient = value_and_gradient(name, x, multi_label=True)
    assert np.abs(gradient[moved]).max() > 1e-3
    for key in stopped:
        assert not gradient[key].any(), key
    if name.startswith("inverse_contrast"):
        # A gate scales the gradient, but not the count of the mean.
        gate = x["gate_u"][:, None] if name.endswith("gated") else 1.0
        _, plain = value_and_gradient("inverse_contrast", x, multi_label=True)
        np.testing.assert_allclose(gradient["h_u"], gate * plain["h_u"], atol=1e-6)


def test_pair_dissociation_moves_images_along_their_own_text_only():
    x = make_arrays()
    _, gradient = value_and_gradient("pair_dissociation_two_sided", x)
    weight = x["weight_u"]
    shares = [shares_of(labels, x["labels_r"]) for labels in x["labels_u"]]
    share = np.array(shares) * (x["weight_r"] > 0)
    class_mean = (x["image"] @ x["text_r"].T * share).sum(1) / share.sum(1)
    excess = (x["image"] * x["text"]).sum(1) - class_mean - 0.1
    expected = (2 * excess * weight / weight.sum())[:, None] * x["text"]
    np.testing.assert_allclose(gradient["image"], expected, atol=1e-6)


def make_edge_cases():
    x, zeros = make_arrays(), np.zeros(NUM_ROWS, np.float32)
    no_positives = make_arrays()
    no_positives["labels_u"][:] = [1, 0, 0]
    no_positives["labels_r"][:] = [0, 1, 0]
    no_positives["labels_r"][3] = [0, 0, 1]
    # One row of each class has a weight, so none has another row of its class.
    no_positives["weight_r"][:] = [1, 0, 0, 1, 0, 0, 0, 0]
    return {
        "no positives": no_positives,
        "no weight": x | {"weight_u": zeros, "weight_r": zeros},
        "no retain rows": x | {"weight_r": zeros},
        "no unlearn rows": x | {"weight_u": zeros},
        "identical rows": {k: np.repeat(a[:1], NUM_ROWS, axis=0) for k, a in x.items()},
        "huge student logits": x | {"student": x["student"] * 1e4},
        "huge teacher logits": x | {"teacher": x["teacher"] * 1e4},
        "one row": {key: a[:1] for key, a in x.items()},
    }


@each_label_kind
@each_objective
def test_edge_cases_are_finite_and_empty_sums_are_zero(name, multi_label):
    zero_cases = ["no weight"]
    if name.startswith(("pair", "separation")):
        zero_cases.append("no positives")
    for case, x in make_edge_cases().items():
        value, gradient = value_and_gradient(name, x, multi_label=multi_label)
        for key, g in [("value", np.array(value)), *gradient.items()]:
            assert np.isfinite(g).all(), (case, key)
            assert case not in zero_cases or not g.any(), (case, key)


@each_objective
def test_rows_without_weight_are_ignored(name):
    x = make_arrays(multi_label=True)
    value, gradient = value_and_gradient(name, x, multi_label=True)
    other = {key: a.copy() for key, a in x.items()}
    # The columns that are read with the weight of one of the sets.
    columns = {
        "squared_distance": (["image", "text"], []),
        "info_nce": (["image", "text"], []),
        "inverse_contrast": (["h_u", "labels_u"], ["h_r", "labels_r"]),
        "pair_dissociation": (["image", "text", "labels_u"], ["text_r", "labels_r"]),
        "separation": (["h_u"], ["h_r", "labels_r"]),
        "": ([], ["student", "teacher", "labels_r"]),
    }
    keys_u, keys_r = next(columns[key] for key in columns if name.startswith(key))
    for key in (*keys_u, *keys_r):
        weight = x["weight_u" if key in keys_u else "weight_r"]
        other[key][weight == 0] = 1.0 if "labels" in key else 7.0
    changed, changed_gradient = value_and_gradient(name, other, multi_label=True)
    assert changed == value
    for key, g in gradient.items():
        np.testing.assert_array_equal(changed_gradient[key], g, key)


def test_confidence_loss_is_a_huber_loss():
    value, target = jnp.array([1.0, 0.0, 5.0, 9.0]), jnp.array([1.5, 0.0, 2.0, 0.0])
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    run = on_one_device(objectives.confidence_loss)
    assert float(run(value, target, weight)) == pytest.approx((0.125 + 0 + 2.5) / 3)
    gradient = jax.grad(lambda v: run(v, target, weight))(value)
    np.testing.assert_allclose(gradient, [-0.5 / 3, 0, 1 / 3, 0], atol=1e-6)
    assert not jax.grad(lambda t: run(value, t, weight))(target).any()


def test_rows_of_classes_that_are_not_retained_are_only_pulled():
    """As in Lee et al. (2024) for unlearning a whole class."""
    h_u = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    h_r = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    u = LabeledFeatures(h_u, jnp.eye(3)[jnp.array([2, 2])], jnp.ones(2))
    r = LabeledFeatures(h_r, jnp.eye(3)[jnp.array([0, 1])], jnp.ones(2))

    def loss(pull):
        options = {"temperature": 0.5, "pull": jnp.float32(pull)}
        fn = functools.partial(objectives.inverse_contrast, **options)
        return float(on_one_device(fn)(u, r))

    assert loss(1.0) == pytest.approx(-float((h_u @ h_r.T / 0.5).mean()), rel=1e-5)
    assert loss(0.0) == 0
