"""Scores and attacks: equal to scikit-learn's, and they notice bad models."""

import itertools
import warnings

import jax
import numpy as np
import pytest
from sklearn import linear_model, metrics

from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions, ridge
from ccu_jax.evaluate.forward import Forward, pool_tokens
from ccu_jax.evaluate.predictions import SPLITS, Predictions
from ccu_jax.metrics import classification, membership
from ccu_jax.models import VIEWS
from tests import toy

EXACT = 1e-9


def logits_and_labels(multi_label, rows=60, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)).astype(np.float32)
    if multi_label:
        labels = (rng.random((rows, classes)) < 0.3).astype(np.float32)
        # Rows and a class with nothing to find, and with nothing found.
        labels[:4], logits[:2], logits[6] = 0, -1, -1
        labels[:, 3], logits[:, 3] = 0, -1
    else:
        # No row has class 4 or is taken for it.
        labels = np.eye(classes, dtype=np.float32)[rng.integers(classes - 1, size=rows)]
        logits[:, 4] = -9
    return logits, labels


@pytest.mark.parametrize("seed", range(3))
def test_single_label_scores_are_those_of_scikit_learn(seed):
    logits, labels = logits_and_labels(False, seed=seed)
    truth, guess = labels.argmax(1), logits.argmax(1)
    found = classification.single_label_scores(logits, labels)
    expected = {
        "accuracy": metrics.accuracy_score(truth, guess),
        "macro_f1": metrics.f1_score(
            truth, guess, labels=range(5), average="macro", zero_division=0
        ),
    }
    assert found == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_scores_are_those_of_scikit_learn(seed):
    logits, labels = logits_and_labels(True, seed=seed)
    found = classification.multi_label_scores(logits, labels)
    expected = {
        f"{average}_f1": metrics.f1_score(
            labels, logits > 0, average=average, zero_division=0
        )
        for average in ("micro", "macro", "weighted", "samples")
    }
    assert found == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [0, 3], ids=["no ties", "ties"])
def test_the_auroc_of_two_classes_is_that_of_scikit_learn(levels, seed):
    rng = np.random.default_rng(seed)
    labels = np.eye(2, dtype=np.float32)[rng.integers(2, size=200)]
    logits = rng.normal(size=labels.shape).astype(np.float32) + 0.4 * labels
    if levels:
        logits = np.round(levels * logits)
    score = logits[:, 1].astype(np.float64) - logits[:, 0]
    found = classification.single_label_scores(logits, labels)
    expected = metrics.roc_auc_score(labels[:, 1], score)
    assert found["auroc"] == pytest.approx(expected, abs=EXACT)
    assert 0.5 < expected < 0.9
    swapped = classification.single_label_scores(logits[:, ::-1], labels[:, ::-1])
    assert swapped["auroc"] == pytest.approx(expected, abs=EXACT)
    worst = classification.single_label_scores(-logits, labels)
    assert worst["auroc"] == pytest.approx(1 - expected, abs=EXACT)


def test_the_auroc_does_not_depend_on_the_threshold_or_on_a_class_being_rare():
    labels = np.eye(2)[[1] + [0] * 9]
    logits = np.stack([np.zeros(10), -5.0 - np.arange(10)], 1)
    found = classification.single_label_scores(logits, labels)
    assert found["auroc"] == 1 and found["accuracy"] == 0.9
    # Values that single precision would tie.
    close = np.stack([np.full(10, 1e-9), np.full(10, 1.0)], 1).astype(np.float32)
    close[0, 0] = 0
    assert classification.single_label_scores(close, labels)["auroc"] == 1


def test_there_is_no_auroc_where_it_means_nothing():
    logits, labels = logits_and_labels(False)
    assert "auroc" not in classification.single_label_scores(logits, labels)
    for only in (0, 1):
        labels = np.eye(2)[np.full(len(logits), only)]
        found = classification.single_label_scores(logits[:, :2], labels)
        assert set(found) == {"accuracy", "macro_f1"}


def test_scores_of_nothing_found_are_zero_and_of_the_truth_one():
    labels = np.array([[1.0, 0], [0, 1]])
    logits = 2 * labels - 1
    assert set(classification.multi_label_scores(logits, labels).values()) == {1.0}
    assert set(classification.single_label_scores(logits, labels).values()) == {1.0}
    assert set(classification.multi_label_scores(-abs(logits), labels).values()) == {
        0.0
    }
    assert set(classification.single_label_scores(-logits, labels).values()) == {0.0}


@pytest.mark.parametrize("values", [1000, 7, 1], ids=["few ties", "ties", "all tied"])
def test_the_attack_is_the_area_under_the_roc_curve(values):
    rng = np.random.default_rng(0)
    members, others = rng.integers(values, size=83), rng.integers(values, size=41) - 0.0
    expected = metrics.roc_auc_score(
        [*[1] * 83, *[0] * 41], np.concatenate([members, others])
    )
    assert classification.auc(members, others) == pytest.approx(expected, abs=EXACT)
    assert classification.auc(others, members) == pytest.approx(1 - expected, abs=EXACT)


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_confidence_is_minus_the_log_loss(multi_label):
    logits, labels = logits_and_labels(multi_label)
    found = membership.log_likelihood(logits, labels, multi_label)
    x = logits.astype(np.float64)
    if multi_label:
        p = 1 / (1 + np.exp(-x))
        rows = [
            -len(y) * metrics.log_loss(y, q, labels=[0, 1])
            for y, q in zip(labels, p, strict=True)
        ]
    else:
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        rows = np.log(p[labels > 0])
    np.testing.assert_allclose(found, rows, atol=1e-7)
    huge = membership.log_likelihood(1e4 * logits, labels, multi_label)
    assert np.isfinite(huge).all()


# --- outputs of models with known faults ----------------------------------------------


def stored(multi_label, fault):
    """Outputs in which the unlearn set's logits are what `fault` makes of the truth."""
    rng = np.random.default_rng(1)
    count = 300
    of = np.repeat(SPLITS, count)
    logits, labels = logits_and_labels(multi_label, rows=len(of))
    usual = logits + 2 * labels
    truth = 2 * labels - 1
    unlearn = (of == "unlearn")[:, None]
    made = {
        "perfect memory": 20 * truth,
        "over-forgetting": -20 * truth,
        "random": rng.normal(size=logits.shape),
        "like unseen rows": usual,
    }[fault]
    views = {view: np.where(unlearn, made, usual) for view in VIEWS}
    if fault == "random":
        views = {view: rng.normal(size=logits.shape) for view in VIEWS}
    sign = {"perfect memory": 1, "over-forgetting": -1}.get(fault, 0)
    pair = rng.uniform(-1, 1, len(of)) * (1 - abs(sign) * unlearn[:, 0])
    pair += 2 * sign * unlearn[:, 0]
    names = np.array([f"row{i}" for i in range(len(of))])
    there = np.ones(len(of), bool)
    group = np.arange(len(of))
    return Predictions(
        views, pair, labels, of, names, there, there, multi_label, pair, group
    )


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize(
    "fault, low, high",
    [
        ("perfect memory", 0.999, 1.0),
        ("random", 0.4, 0.6),
        ("like unseen rows", 0.4, 0.6),
        ("over-forgetting", 0.0, 0.001),
    ],
)
def test_the_attack_notices(fault, low, high, multi_label):
    found = predictions.attack_auc(stored(multi_label, fault))
    assert set(found) == {*VIEWS, "pair", "white"}
    for name, value in found.items():
        assert low <= value <= high, name


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_scores_notice_too_and_only_in_the_set_that_is_concerned(multi_label):
    score = "micro_f1" if multi_label else "accuracy"
    usual, memory, over, random = (
        predictions.compute_scores(stored(multi_label, fault))
        for fault in ("like unseen rows", "perfect memory", "over-forgetting", "random")
    )
    for view in VIEWS:
        assert memory["unlearn"][view][score] == 1
        assert over["unlearn"][view][score] == 0
        assert 0.5 < usual["unlearn"][view][score] < 1
        for name in ("retain", "unseen", "validation", "test"):
            assert memory[name][view] == over[name][view] == usual[name][view]
            assert random[name][view][score] < usual[name][view][score] - 0.1


def test_only_unlearn_and_unseen_rows_are_attacked():
    outputs = stored(False, "like unseen rows")
    before = predictions.attack_auc(outputs)
    concerned = np.isin(outputs.split, ["unlearn", "unseen"])
    views = {
        view: np.where(concerned[:, None], x, 99 * outputs.labels)
        for view, x in outputs.logits.items()
    }
    assert predictions.attack_auc(outputs._replace(logits=views)) == before


def test_a_view_is_judged_by_the_rows_that_have_what_it_looks_at():
    whole = stored(False, "perfect memory")
    lost = np.random.default_rng(2).random((2, len(whole.split))) < 0.2
    has_image, has_text = ~lost[0], ~(lost[1] & ~lost[0])
    # What a model makes of a picture or text that is not there is nonsense.
    views = {
        "image": np.where(
            has_image[:, None], whole.logits["image"], -99 * whole.labels
        ),
        "text": np.where(has_text[:, None], whole.logits["text"], -99 * whole.labels),
        "fused": np.where(
            has_image[:, None], whole.logits["fused"], -99 * whole.labels
        ),
    }
    outputs = whole._replace(
        logits=views,
        pair=np.where(has_image & has_text, whole.pair, -1),
        trunk_probe=np.where(has_image, whole.pair, -1),
        has_image=has_image,
        has_text=has_text,
    )
    scores = predictions.compute_scores(outputs)["unlearn"]
    assert scores["image"]["accuracy"] == scores["text"]["accuracy"] == 1
    rows = whole.split == "unlearn"
    kept = has_image[rows].mean()
    assert scores["fused"]["accuracy"] == pytest.approx(kept)
    # Rows without a picture have none that could be remembered.
    assert min(predictions.attack_auc(outputs).values()) > 0.999


def test_what_no_row_has_is_not_measured():
    outputs = stored(True, "random")
    none = outputs._replace(has_text=np.zeros(len(outputs.split), bool))
    scores, attacks = predictions.compute_scores(none), predictions.attack_auc(none)
    assert all(of_set["text"] == {} for of_set in scores.values())
    assert (
        scores["test"]["image"] == predictions.compute_scores(outputs)["test"]["image"]
    )
    assert attacks["text"] is None and attacks["pair"] is None
    assert attacks["fused"] is not None


def test_outputs_come_back_from_their_file(tmp_path):
    for multi_label in (False, True):
        outputs = stored(multi_label, "random")
        path = tmp_path / "outputs.npz"
        predictions.save_predictions(path, outputs)
        again = predictions.load_predictions(path)
        assert again.multi_label is multi_label
        assert set(again.logits) == set(VIEWS)
        for view in VIEWS:
            np.testing.assert_array_equal(again.logits[view], outputs.logits[view])
        for name in ("pair", "labels", "split", "id", "has_image", "has_text"):
            np.testing.assert_array_equal(getattr(again, name), getattr(outputs, name))
        assert predictions.compute_scores(again) == predictions.compute_scores(outputs)
        assert predictions.attack_auc(again) == predictions.attack_auc(outputs)


@pytest.mark.parametrize("change", ["gone", "empty", "cut", "flipped"])
@pytest.mark.parametrize("place", ["outputs", "shadows"])
def test_outputs_that_cannot_be_read_are_named_with_the_remedy(tmp_path, place, change):
    path = tmp_path / place / "ccu_plus-0.npz"
    path.parent.mkdir()
    predictions.save_predictions(path, stored(False, "random"))
    whole = bytearray(path.read_bytes())
    path.unlink()
    for at in range(0, len(whole), 97) if change == "flipped" else ():
        whole[at] ^= 0xFF
    if change != "gone":
        path.write_bytes({"empty": b"", "cut": whole[:-50]}.get(change, whole))
    record = tmp_path / "stages" / "ccu_plus-0.json"
    remedy = f"remove {record if place == 'outputs' else path} and rerun"
    with pytest.raises(UserError, match=f"{path}: missing or damaged; {remedy}"):
        predictions.load_predictions(path)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_model_that_fell_apart_is_told_from_one_that_did_not(multi_label):
    rng = np.random.default_rng(0)
    labels = toy.random_labels(rng, 300, multi_label)
    there = np.ones(300, bool)
    of = np.repeat("test", 300)

    def said(logits):
        views = dict.fromkeys(VIEWS, logits)
        return Predictions(
            views, logits[:, 0], labels, of, of, there, there, multi_label, of, of
        )

    knows = said(4 * labels - 2 + rng.normal(size=labels.shape))
    weaker = said(3 * labels - 1.5 + rng.normal(size=labels.shape))
    same = said(np.ones_like(labels) * [3.0, 2.0, 1.0])
    broken = said(np.where(labels > 0, np.nan, 1.0))
    assert predictions.describe_collapse(knows, knows) is None
    assert predictions.describe_collapse(weaker, knows) is None
    assert "collapsed" in predictions.describe_collapse(same, knows)
    assert "not finite" in predictions.describe_collapse(broken, knows)
    # Where the original knows nothing there is nothing to fall from.
    assert predictions.describe_collapse(same, same) is None


def test_guessing_is_as_good_as_the_best_single_answer():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]], float)
    best = max(
        classification.multi_label_scores(np.tile(np.array(x) - 0.5, (4, 1)), labels)[
            "micro_f1"
        ]
        for x in itertools.product([0, 1], repeat=3)
    )
    assert classification.best_constant_score(labels, True) == pytest.approx(best)
    single = np.eye(3)[[0, 0, 1, 2]]
    assert classification.best_constant_score(single, False) == 0.5


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_white_box_sees_what_features_remember_and_nothing_else(multi_label):
    rng = np.random.default_rng(0)
    of = np.repeat(["retain", "unlearn", "unseen"], [400, 200, 200])
    labels = toy.random_labels(rng, len(of), multi_label)
    known = of == "retain"
    taught = known | (of == "unlearn")
    plain = labels @ rng.normal(size=(3, 20)) + 3 * rng.normal(size=(len(of), 20))
    kept = plain + 2 * taught[:, None] * labels @ rng.normal(size=(3, 20))

    def attack(features):
        white = ridge.probe_margin(features, labels, known, multi_label)
        nothing = np.zeros((len(of), 3))
        there = np.ones(len(of), bool)
        said = Predictions(
            dict.fromkeys(VIEWS, nothing),
            *(nothing[:, 0], labels, of, of, there, there, multi_label, white, of),
        )
        return predictions.attack_auc(said)["white"]

    assert attack(kept) > 0.7
    assert 0.42 < attack(plain) < 0.58


def test_the_white_box_is_a_ridge_regression_on_the_known_rows():
    rng = np.random.default_rng(1)
    features, known = rng.normal(size=(90, 6)), np.arange(90) % 3 > 0
    labels = np.eye(4)[rng.integers(4, size=90)]
    variance = features[known].var(axis=0).sum() * known.sum() / 6
    model = linear_model.Ridge(2.5 * variance).fit(features[known], labels[known])
    told = model.predict(features)
    other = np.where(labels > 0, -np.inf, told).max(axis=1)
    found = ridge.probe_margin(features, labels, known, False, strength=2.5)
    np.testing.assert_allclose(found, (told * labels).sum(1) - other, atol=1e-9)
    nothing = ridge.probe_margin(features * np.nan, labels, known, False)
    assert np.isnan(nothing).all()


# --- the pass over the rows -----------------------------------------------------------

ROWS = np.array([5, 0, 11, 3, 3, 54, 20, 21, 22, 30, 31, 9, 17])


@pytest.fixture(scope="module")
def plain():
    """A problem, and what its model says of `ROWS` without any executor."""
    problem = toy.make_problem(parallel.vmap(1))
    rows = {name: x[ROWS] for name, x in problem.table.items()}
    apply, trunk = jax.jit(problem.model.apply), jax.jit(problem.model.trunk)
    out = apply(problem.params, rows)
    features = trunk(problem.params, rows["image"])
    said = out._asdict() | {"pooled": pool_tokens(features)}
    return problem, said, {"features": features, "h_text": out.h_text}


EXECUTORS = [
    (parallel.vmap, (1,), 4),
    (parallel.vmap, (2,), 6),
    (parallel.vmap, (4,), 7),  # not a multiple: rounded up to 8
    (parallel.vmap, (1,), 64),  # more than there are rows
    (parallel.pmap, (), 8),
]


@pytest.mark.parametrize("make, devices, batch", EXECUTORS)
def test_one_pass_gives_each_row_its_outputs_however_it_is_cut(
    plain, make, devices, batch
):
    problem, expected, encoded = plain
    executor = make(*devices)
    forward = Forward(problem.model, executor, batch)
    params, table = executor.replicate((problem.params, problem.table))
    found = forward.outputs(params, table, ROWS)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert len(value) == len(ROWS)
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    found = forward.encode(params, table, ROWS)
    assert set(found) == set(encoded)
    for name, value in found.items():
        assert value.shape == encoded[name].shape
        np.testing.assert_allclose(value, encoded[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("where", ["array", "host", "devices"])
@pytest.mark.parametrize("make, devices, batch", EXECUTORS[1:])
def test_what_was_encoded_before_gives_the_same_bits_as_the_pictures(
    plain, make, devices, batch, where
):
    problem, *_ = plain
    executor = make(*devices)
    forward = Forward(problem.model, executor, batch)
    params, table = executor.replicate((problem.params, problem.table))
    expected = forward.outputs(params, table, ROWS)
    # In a table of its own, of all rows, without pictures and texts.
    every = np.arange(len(table["labels"]))
    encoded = forward.encode(params, table, every)
    put = {
        "array": lambda x: x,
        "host": lambda x: HostColumn(x, np.ones(len(every), bool)),
        "devices": executor.replicate,
    }[where]
    names = ("labels", "has_image", "has_text")
    encoded = {name: put(x) for name, x in encoded.items()}
    found = forward.outputs(
        params, {**{name: table[name] for name in names}, **encoded}, ROWS
    )
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def test_a_pass_is_traced_once_for_all_its_calls(plain):
    problem, *_ = plain
    traced = []

    def counting(name):
        def call(*args, **kwargs):
            traced.append(name)
            return getattr(problem.model, name)(*args, **kwargs)

        return call

    names = ("trunk", "read", "apply")
    model = problem.model._replace(**{name: counting(name) for name in names})
    forward = Forward(model, parallel.vmap(2), 8)
    for seed, rows in enumerate((ROWS, ROWS[:3], np.arange(40))):
        params = problem.model.init(jax.random.key(seed))
        forward.outputs(params, problem.table, rows)
        encoded = forward.encode(params, problem.table, rows)
        has = {name: problem.table[name][rows] for name in ("has_image", "has_text")}
        forward.outputs(params, {**has, **encoded}, np.arange(len(rows)))
    assert sorted(traced) == sorted(names)


def test_results_name_each_row_and_its_set(plain):
    problem = plain[0]
    data = toy.make_dataset()
    found = predictions.predict_all_splits(
        problem.forward, problem.params, problem.table, data, problem.sets
    )
    assert len(found.id) == len(set(found.id)) == len(found.pair)
    for name in SPLITS:
        rows = getattr(problem.sets, name)
        mine = found.split == name
        np.testing.assert_array_equal(found.id[mine], data.id[rows])
        np.testing.assert_array_equal(found.labels[mine], data.labels[rows])
        out = problem.forward.outputs(problem.params, problem.table, rows)
        for view in VIEWS:
            np.testing.assert_allclose(found.logits[view][mine], out[view], atol=1e-5)
        cosine = (np.asarray(out["z_image"]) * np.asarray(out["z_text"])).sum(1)
        np.testing.assert_allclose(found.pair[mine], cosine, atol=1e-5)


def test_scores_have_every_set_and_view_and_are_numbers(plain):
    problem = plain[0]
    data = toy.make_dataset()
    found = predictions.predict_all_splits(
        problem.forward, problem.params, problem.table, data, problem.sets
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = predictions.compute_scores(found)
    assert list(scores) == list(SPLITS)
    for of_set in scores.values():
        assert list(of_set) == list(VIEWS)
        for of_view in of_set.values():
            assert "accuracy" in of_view
            assert all(0 <= value <= 1 for value in of_view.values())
