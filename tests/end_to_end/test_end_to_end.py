"""Whole runs from the command line: files, results, purges, samples and models.

Kills, preemptions and damaged files are tested in `tests/faults`, which also compares
two runs with the same seed.
"""

import json
import shutil
import signal
import sys

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.inference import load_classifier
from tests import toy
from tests.end_to_end import launching
from tests.end_to_end.conftest import (
    METHODS,
    load_by_method,
    load_json,
    load_outputs,
    read_events,
    read_files,
    read_ids,
)
from tests.end_to_end.launching import ROOT, communicate, fail_command, run_command

FOLDERS = ("checkpoints", "outputs", "stages", "data", "unlearn_sets")


@pytest.mark.smoke
@pytest.mark.slow
def test_run_leaves_the_files_of_its_report(finished):
    workdir, out = finished
    config = load_json(workdir / "config.json")
    assert config["name"] == "small" and config["ccu_plus"]["steps"] == 8
    ends = read_events(workdir, "stage_end")
    titles = {"data", "report", *(f"seed 0: {method}" for method in METHODS)}
    assert {event["title"] for event in ends} == titles
    assert all(event["failure"] is None for event in ends)
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (workdir / "table.md").read_text("utf-8")
    page = (workdir / "report.html").read_text("utf-8")
    assert table in out and str(workdir / "report.html") in out
    assert all("clip art" in text.lower() for text in (out, table, page))
    for method in METHODS:
        assert f"| {method} |" in table and method in page
        assert (workdir / "outputs" / f"{method}-0.npz").is_file()
    assert not [*workdir.rglob("*.tmp"), *workdir.rglob("*.new")]
    stores = [path.parent.name for path in workdir.glob("checkpoints/*/features")]
    assert stores == ["original-0"]
    assert not list(workdir.glob("checkpoints/*/steps*")), "no longer needed"


@pytest.mark.smoke
@pytest.mark.slow
def test_results_have_all_documented_keys(finished):
    workdir, _ = finished
    results = load_json(workdir / "results.json")
    assert [result["method"] for result in results] == list(METHODS)
    ids = read_ids(workdir)
    for result in results:
        assert (result["config"], result["seed"]) == ("small", 0)
        assert (result["metric"], result["edition"]) == ("accuracy", "clipart")
        near = result["unlearn_set"].pop("near_duplicates")
        assert set(near) == set(SPLITS) and near["retain"] == near["unseen"] == 0
        rule = {"rule": "random:0.1", "modality": "image"}
        assert result["unlearn_set"] == {**rule, "count": len(ids), "images": len(ids)}
        assert result["counts"]["unlearn"] == len(ids)
        assert result["corruptions"] == {} and result["data"]["used"] == 1408
        seconds = result["seconds"]
        assert set(seconds) >= {"start", "steps", "unlearn", "compile", "evaluate"}
        assert seconds["unlearn"] == seconds["start"] + seconds["steps"]
        assert result["features"] == "stored"
        # Features are stored with the original and not in the time of a method.
        assert seconds["total"] >= seconds["unlearn"] + seconds["features"] > 0
        assert (seconds["features"] > 0.01) >= (result["method"] == "original")
        assert set(result["scores"]) == set(SPLITS)
        for scores_by_view in result["scores"].values():
            assert set(scores_by_view) == {"image", "text", "fused"}
            for scores in scores_by_view.values():
                assert set(scores) >= {"accuracy", "macro_f1"}
                assert all(0 <= score <= 1 for score in scores.values())
        assert set(result["attack_auc"]) >= {"image", "text", "fused"}
        assert all(0 <= auc <= 1 for auc in result["attack_auc"].values())
        device = result["device"]
        assert "kind" in device and (device["count"], device["processes"]) == (1, 1)
        assert set(result["versions"]) >= {"ccu_jax", "jax"} and "commit" in result
        # The recorded unlearn set is the evaluated one.
        predicted = load_outputs(workdir, result["method"])
        assert sorted(ids) == sorted(predicted.id[predicted.split == "unlearn"])
        assert len(set(predicted.id.tolist())) == len(predicted.id)


@pytest.mark.smoke
@pytest.mark.slow
def test_ccu_plus_leaves_texts_unchanged_to_the_bit(finished):
    workdir, _ = finished
    before, retrained, after = (load_outputs(workdir, m).logits for m in METHODS)
    assert before["text"].tobytes() == after["text"].tobytes()
    assert before["image"].tobytes() != after["image"].tobytes()
    assert before["text"].tobytes() != retrained["text"].tobytes()
    results = load_by_method(workdir / "results.json")
    assert [results[m]["text_unchanged"] for m in METHODS] == [True, False, True]
    old, new = (load_classifier(workdir, name).params for name in METHODS[::2])
    for module in ("text", "text_projection", "text_head", "image_trunk"):
        assert toy.trees_equal(old[module], new[module])


def _read_starts(workdir):
    return [event["title"] for event in read_events(workdir, "stage_start")]


@pytest.mark.slow
def test_finished_run_is_shown_without_training_or_tensorflow(small, finished, copy):
    shutil.rmtree(copy / "checkpoints" / "original-0")  # no longer needed
    before, num_old = read_files(copy, *FOLDERS), len(_read_starts(copy))
    code = (
        "import sys; from ccu_jax import launch\n"
        "code = launch.main(sys.argv[1:])\n"
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    argv = (sys.executable, "-c", code, "--config", small, "--workdir", copy)
    process = launching.start_process(*argv)
    out, err = communicate(process)
    assert (process.returncode, err) == (0, "")
    assert (copy / "table.md").read_text("utf-8") in out
    results = [load_json(x / "results.json") for x in (copy, finished[0])]
    assert results[0] == results[1] and before == read_files(copy, *FOLDERS)
    assert _read_starts(copy)[num_old:] == ["data", "report"]


@pytest.mark.slow
def test_only_new_methods_and_seeds_are_run(small, copy):
    before, num_old = read_files(copy, *FOLDERS), len(_read_starts(copy))
    flags = ("--methods", "retrain", "--seeds", "0,1")
    run_command("--config", small, "--workdir", copy, *flags)
    new = ["seed 0: retrain", "seed 1: original", "seed 1: retrain"]
    assert _read_starts(copy)[num_old:] == ["data", *new, "report"]
    assert before.items() <= read_files(copy, *FOLDERS).items()
    results = load_json(copy / "results.json")
    assert [(result["seed"], result["method"]) for result in results] == [
        *((0, m) for m in ("original", "retrain", "retrain_visual", "ccu_plus")),
        *((1, m) for m in ("original", "retrain")),
    ]


@pytest.mark.slow
def test_interrupt_prints_one_line_and_exits_with_code_130(small, copy):
    for folder in ("stages", "checkpoints", "outputs"):
        shutil.rmtree(copy / folder)
    num_old = len(_read_starts(copy))
    process = launching.start_command("--config", small, "--workdir", copy)
    launching.wait_until(lambda: len(_read_starts(copy)) > num_old + 1, process)
    process.send_signal(signal.SIGINT)
    out, err = communicate(process, 60)
    assert process.returncode == 130 and err.count("\n") == 1, err
    assert "seed 0: original ..." in out and "done, 12/12" not in out


@pytest.mark.slow
def test_changed_data_are_rejected_and_change_no_result(small, tmp_path):
    folder, workdir = tmp_path / "own", tmp_path / "run"
    shutil.copytree(ROOT / "ccu_jax/data/clipart", folder)
    argv = ["--config", small, "--workdir", workdir, "--data-dir", folder]
    argv += ["--methods", "original"]
    run_command(*argv)
    before = read_files(workdir, *FOLDERS)
    path = folder / "pairs.jsonl"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"text": "', '"text": "another ', 1), "utf-8")
    err = fail_command(*argv)
    assert "changed" in err and str(folder) in err and "--workdir" in err
    assert before == read_files(workdir, *FOLDERS)


CORRUPTIONS = ("missing_image", "missing_text", "incomplete")
CORRUPTIONS += ("noisy_labels", "noisy_text")
SAMPLE_CONFIG = """
import dataclasses
from ccu_jax.config import CcuPlus, Corruptions, Finetune, Model, Run, Train
from ccu_jax.config.loading import load_config

config = dataclasses.replace(
    load_config("NAME", ["data.sample_rows=240", "data.image_size=16"]),
    name="sample",
    corruptions=Corruptions(missing_image=0.1, missing_text=0.1, incomplete=0.1,
                            noisy_labels=0.1, noisy_text=0.1, order="stored"),
    model=Model(patch=4, image_width=8, image_depth=1, text_width=8, text_depth=1,
                heads=2, embed_dim=4),
    train=Train(epochs=1, batch=32),
    finetune=Finetune(epochs=1, batch=32, learning_rate=1e30),
    ccu_plus=CcuPlus(steps=4, batch=16, unlearn_batch=8, heldout_batch=8),
    run=Run(steps_per_call=2),
)
"""


def run_sample(tmp_path, name, *flags):
    config, workdir = tmp_path / "sample.py", tmp_path / "run"
    config.write_text(SAMPLE_CONFIG.replace("NAME", name))
    out = run_command("--config", config, "--workdir", workdir, *flags)
    assert "Sample edition" in out
    results = load_by_method(workdir / "results.json")
    assert {result["edition"] for result in results.values()} == {"sample"}
    return workdir, out, results


@pytest.mark.slow
def test_class_is_unlearned_although_another_method_diverges(tmp_path):
    flags = (
        "--unlearn",
        "class:Comedy",
        "--methods",
        "retrain_visual,finetune,ccu_plus",
    )
    workdir, out, results = run_sample(tmp_path, "mmimdb", *flags)
    assert "Sample edition" in (workdir / "table.md").read_text("utf-8")
    assert results["original"]["unlearn_set"]["rule"] == "class:Comedy"
    assert all(results[name]["diverged"] is None for name in METHODS)
    assert results["ccu_plus"]["text_unchanged"] is True
    diverged = results["finetune"]
    assert diverged["diverged"].startswith("step ")
    assert "step 0" in diverged["diverged"], "the original is kept"
    assert diverged["scores"]["test"] == results["original"]["scores"]["test"]
    assert "finetune (diverged)" in out and "ccu_plus (diverged)" not in out
    # The class is unlearned as a whole, with non-members of the same class.
    predicted = load_outputs(workdir, "ccu_plus")
    labels = {name: predicted.labels[predicted.split == name] for name in SPLITS}
    common = np.flatnonzero(labels["unlearn"].all(axis=0))
    assert len(common) == 1 and labels["unseen"][:, common].all()
    assert not labels["retain"][:, common].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, metric",
    [("fashion200k", "accuracy"), ("hatefulmemes", "auroc"), ("medical", "micro_f1")],
)
def test_sample_edition_is_corrupted_unlearned_and_purged(tmp_path, name, metric):
    flags = ("--methods", "ccu_plus", "--purge")
    workdir, out, results = run_sample(tmp_path, name, *flags)
    assert ": 0 found" in out
    for result in results.values():
        assert result["metric"] == metric
        assert 0 <= result["scores"]["test"]["fused"][metric] <= 1
        corruptions = result["corruptions"]
        assert all(corruptions[key]["rows"] > 5 for key in CORRUPTIONS)
        assert corruptions["order"] == "stored"
        assert result["data"]["used"] == result["data"]["read"] == 240
    assert load_json(workdir / "purge.json")["hits"] == []


@pytest.mark.slow
def test_purged_run_is_shown_but_runs_nothing_new(small, copy):
    argv = ("--config", small, "--workdir", copy)
    before = read_files(copy, *FOLDERS[:3])
    out = run_command(*argv, "--purge")
    report = load_json(copy / "purge.json")
    assert report["num_images"] >= len(read_ids(copy)) > 50 and report["hits"] == []
    assert f"purged {report['num_images']} images" in out
    after = read_files(copy, *FOLDERS[:3])
    removed = {p.as_posix().partition("/params/")[0] for p in before.keys() - after}
    assert removed == {"checkpoints/original-0"} and report["models"] == 1
    assert not (copy / "checkpoints" / "original-0" / "params").exists()
    changed = {path for path in before.keys() & after if before[path] != after[path]}
    features = "checkpoints/original-0/features"
    assert {path.parent.as_posix() for path in changed} == {features}
    ids = np.load(copy / "data" / "id.npy").tolist()
    is_removed = ~np.fromfile(copy / features / "there.bin", bool)
    assert is_removed[[ids.index(id_) for id_ in read_ids(copy)]].all()
    assert is_removed.sum() == report["features"] < len(ids)
    with pytest.raises(UserError, match="purged"):
        load_classifier(copy, "original")
    assert load_classifier(copy, "ccu_plus").classes
    assert "| ccu_plus |" in run_command(*argv)
    for flags in (["--seeds", "0,1"], ["--audit", "standard"]):
        err = fail_command(*argv, *flags)
        assert "purged" in err and "another --workdir" in err


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_loaded_model_predicts_what_was_stored(finished, method):
    stored = load_outputs(finished[0], method)
    folder = ROOT / "ccu_jax" / "data" / "clipart"
    lines = (folder / "pairs.jsonl").read_text("utf-8").splitlines()
    index = {row["id"]: row for row in map(json.loads, lines)}
    test_rows = np.flatnonzero(stored.split == "test")[:70]
    rows = [index[id_] for id_ in stored.id[test_rows]]
    model = load_classifier(finished[0], method)
    images = [folder / row["image"] for row in rows]
    images[0] = images[0].read_bytes()
    predicted = model.predict_probabilities(images, [row["text"] for row in rows])
    for view, logits in stored.logits.items():
        odds = np.exp(logits[test_rows].astype(float))
        expected = odds / odds.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(predicted[view], expected, atol=1e-4)
    image_only = model.predict_probabilities(images[:1], [None])
    np.testing.assert_allclose(image_only["image"], predicted["image"][:1], atol=1e-6)
    np.testing.assert_allclose(image_only["fused"].sum(), 1)


@pytest.mark.slow
def test_invalid_use_of_a_model_is_rejected(finished, copy, tmp_path):
    with pytest.raises(
        UserError, match="finished model scrub of seed 0; choose from: cc"
    ):
        load_classifier(finished[0], "scrub")
    with pytest.raises(UserError, match="choose from: none"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        load_classifier(tmp_path / "nowhere")
    (meta,) = copy.glob("checkpoints/ccu_plus-0/params/*/meta/metadata")
    meta.write_bytes(meta.read_bytes()[:-9])
    remedy = f"missing or damaged .*; remove {copy}/stages/ccu_plus-0.json and rerun"
    with pytest.raises(UserError, match=remedy):
        load_classifier(copy)
    model = load_classifier(finished[0])
    with pytest.raises(UserError, match="image: unusable .not an image"):
        model.predict_probabilities([b"words"], [None])
    with pytest.raises(UserError, match="1 images but 2 texts"):
        model.predict_probabilities([None], ["one", "two"])
    assert model.predict_probabilities([], [])["fused"].shape == (0, 10)
