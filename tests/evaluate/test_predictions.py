"""Predictions, their scores and their attacks reveal known faults of a model."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import (
    SPLITS,
    attack_auc,
    compute_scores,
    describe_collapse,
    load_predictions,
    predict_all_splits,
    save_predictions,
)
from ccu_jax.models import VIEWS
from tests import toy
from tests.audits.conftest import make_predictions

BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


def faulty(multi_label, fault):
    """Returns predictions with a fault on the unlearn set (`random`: on all rows)."""
    rng, sizes = np.random.default_rng(1), dict.fromkeys(SPLITS, 300)
    labels = toy.random_labels(rng, 300 * len(SPLITS), multi_label)
    usual = 2 * labels + rng.normal(size=labels.shape) - 1
    sign = {"perfect memory": 1, "over-forgetting": -1}.get(fault, 0)
    is_unlearn = np.repeat(SPLITS, 300) == "unlearn"
    extreme = 20 * sign * (2 * labels - 1) if sign else usual
    views = {v: np.where(is_unlearn[:, None], extreme, usual) for v in VIEWS}
    if fault == "random":
        views = {view: rng.normal(size=labels.shape) for view in VIEWS}
    signal = rng.uniform(-1, 1, len(labels))
    signal = np.where(is_unlearn & (sign != 0), 2 * sign, signal)
    return make_predictions(views, labels, signal, sizes, multi_label=multi_label)


@BOTH
@pytest.mark.parametrize(
    "fault, low, high",
    [
        ("perfect memory", 0.999, 1.0),
        ("random", 0.4, 0.6),
        ("none", 0.4, 0.6),
        ("over-forgetting", 0.0, 0.001),
    ],
)
def test_attack_auc_reveals_the_fault(fault, low, high, multi_label):
    predictions = faulty(multi_label, fault)
    aucs = attack_auc(predictions)
    assert set(aucs) == {*VIEWS, "pair", "white"}
    for view, auc in aucs.items():
        assert auc is not None and low <= auc <= high, view
    # Other splits do not count.
    is_attacked = np.isin(predictions.split, ["unlearn", "unseen"])
    changed = {
        view: np.where(is_attacked[:, None], x, 99 * predictions.labels)
        for view, x in predictions.logits.items()
    }
    assert attack_auc(predictions._replace(logits=changed)) == aucs


@BOTH
def test_scores_reveal_the_fault_in_its_split_alone(multi_label):
    name = "micro_f1" if multi_label else "accuracy"
    usual, memory, over, random = (
        compute_scores(faulty(multi_label, fault))
        for fault in ("none", "perfect memory", "over-forgetting", "random")
    )
    for view in VIEWS:
        assert memory["unlearn"][view][name] == 1
        assert over["unlearn"][view][name] == 0
        assert 0.5 < usual["unlearn"][view][name] < 1
        for split in set(SPLITS) - {"unlearn"}:
            assert memory[split][view] == over[split][view] == usual[split][view]
            assert random[split][view][name] < usual[split][view][name] - 0.1


def test_view_is_scored_and_attacked_on_rows_that_have_its_modalities():
    complete = faulty(False, "perfect memory")
    is_missing = np.random.default_rng(2).random((2, len(complete.split))) < 0.2
    has_image, has_text = ~is_missing[0], ~(is_missing[1] & ~is_missing[0])
    # Predictions from a missing image or text are wrong.
    has = {"image": has_image, "text": has_text, "fused": has_image}
    partial = complete._replace(
        logits={
            view: np.where(has[view][:, None], x, -99 * complete.labels)
            for view, x in complete.logits.items()
        },
        pair=np.where(has_image & has_text, complete.pair, -1),
        trunk_probe=np.where(has_image, complete.trunk_probe, -1),
        has_image=has_image,
        has_text=has_text,
    )
    scores = compute_scores(partial)["unlearn"]
    assert scores["image"]["accuracy"] == scores["text"]["accuracy"] == 1
    # The fused view also has the rows with a text alone, on which it is wrong.
    fraction = has_image[complete.split == "unlearn"].mean()
    assert scores["fused"]["accuracy"] == pytest.approx(fraction)
    # Rows without an image are not attacked.
    assert all(auc is not None and auc > 0.999 for auc in attack_auc(partial).values())
    no_text = partial._replace(has_text=np.zeros_like(has_text))
    scores, aucs = compute_scores(no_text), attack_auc(no_text)
    assert all(of_split["text"] == {} for of_split in scores.values())
    assert scores["test"]["image"] == compute_scores(partial)["test"]["image"]
    assert aucs["text"] is aucs["pair"] is None and aucs["fused"] is not None


@BOTH
def test_saved_predictions_are_loaded_bit_identical(tmp_path, multi_label):
    saved = faulty(multi_label, "random")
    save_predictions(tmp_path / "outputs.npz", saved)
    loaded = load_predictions(tmp_path / "outputs.npz")
    assert loaded.multi_label is multi_label
    np.testing.assert_equal(loaded._asdict(), saved._asdict())
    with np.load(tmp_path / "outputs.npz") as file:  # names in the file stay
        assert {"of", "white", "logits_image"} < set(file)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
@pytest.mark.parametrize("folder", ["outputs", "shadows"])
def test_damaged_predictions_are_reported_with_the_remedy(tmp_path, folder, damage):
    path = tmp_path / folder / "ccu_plus-0.npz"
    path.parent.mkdir()
    save_predictions(path, faulty(False, "random"))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[::97] = bytes(byte ^ 0xFF for byte in flipped[::97])
    path.write_bytes({"truncated": content[:-50], "flipped": flipped}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    record = tmp_path / "stages" / "ccu_plus-0.json"
    remedy = f"remove {record if folder == 'outputs' else path} and rerun"
    with pytest.raises(UserError, match=f"{path}: missing or damaged; {remedy}"):
        load_predictions(path)


@BOTH
def test_collapse_is_described_if_the_original_had_not_collapsed(multi_label):
    rng = np.random.default_rng(0)
    labels = toy.random_labels(rng, 300, multi_label)

    def predict(logits):
        views, size = dict.fromkeys(VIEWS, logits), {"test": 300}
        signal = logits[:, 0]
        return make_predictions(views, labels, signal, size, multi_label=multi_label)

    trained = predict(4 * labels - 2 + rng.normal(size=labels.shape))
    weaker = predict(3 * labels - 1.5 + rng.normal(size=labels.shape))
    constant = predict(np.ones_like(labels) * [3.0, 2.0, 1.0])
    nan = predict(np.where(labels > 0, np.nan, 1.0))
    for harmless in ((trained, trained), (weaker, trained), (constant, constant)):
        assert describe_collapse(*harmless) is None
    assert "collapsed" in (describe_collapse(constant, trained) or "")
    assert "not finite" in (describe_collapse(nan, trained) or "")


def test_predictions_have_the_outputs_of_each_row_of_each_split(problem):
    data, sets, params = toy.make_dataset(), problem.sets, problem.params
    predicted = predict_all_splits(problem.forward, params, problem.table, data, sets)
    assert len(predicted.id) == len(set(predicted.id)) == len(predicted.pair)
    for split in SPLITS:
        rows, is_selected = getattr(sets, split), predicted.split == split
        np.testing.assert_array_equal(predicted.id[is_selected], data.id[rows])
        np.testing.assert_array_equal(predicted.labels[is_selected], data.labels[rows])
        outputs = problem.forward.compute_outputs(params, problem.table, rows)
        for view in VIEWS:
            logits = predicted.logits[view][is_selected]
            np.testing.assert_allclose(logits, outputs[view], atol=1e-5)
        cosine = (outputs["z_image"] * outputs["z_text"]).sum(1)
        np.testing.assert_allclose(predicted.pair[is_selected], cosine, atol=1e-5)
