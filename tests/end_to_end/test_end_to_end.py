"""Whole runs through the command line: results, resuming, the same bits again."""

import fcntl
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ccu_jax.config.schema import from_json
from ccu_jax.evaluate import predictions
from ccu_jax.storage.records import add_line_checksum, read_record
from tests.end_to_end.launching import (
    ROOT,
    SMALL_CONFIG,
    run_command,
    run_environment,
    start_command,
)

METHODS = ("original", "retrain_visual", "ccu_plus")
KILLS = 8


def rows(workdir):
    return json.loads((workdir / "results.json").read_text())


def events(workdir, kind):
    lines = (workdir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def files(workdir, *folders):
    """Every file below the folders with its content and time."""
    return {
        path.relative_to(workdir): (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted((workdir / folder).rglob("*"))
        if path.is_file()
    }


def weights(workdir, method, seed=0):
    """The parameters in a checkpoint: names to arrays."""
    import jax

    from ccu_jax.train import checkpoint

    saved = checkpoint.restore(
        workdir / "checkpoints" / f"{method}-{seed}" / "params",
        jax.eval_shape(_model(workdir)[0].init, jax.random.key(0)),
        pytest.fail,
    )
    assert saved is not None, method
    return saved.tree


def _model(workdir):
    from ccu_jax import data, models

    config = from_json(read_record(workdir / "config.json"))
    loaded = data.load(config.data, workdir, lambda *told: None)
    model = models.build(
        config.model,
        num_classes=len(loaded.classes),
        vocab_size=loaded.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    return model, loaded


def assert_same_bits(one, other, methods=METHODS):
    import jax

    for method in methods:
        name = f"outputs/{method}-0.npz"
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
        same = jax.tree.map(
            lambda a, b: a.tobytes() == b.tobytes(),
            weights(one, method),
            weights(other, method),
        )
        assert all(jax.tree.leaves(same)), (method, same)
        if method == "original":
            assert stored(one) and stored(one) == stored(other)


def stored(workdir):
    """The files of the original's features."""
    folder = workdir / "checkpoints" / "original-0" / "features"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The config file."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL_CONFIG)
    return path


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A workdir after one run, which nobody changes, and what was printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run_command("--config", small, "--workdir", workdir)


@pytest.fixture(scope="session")
def again(small, finished, tmp_path_factory):
    """A second run in another folder, and its seconds; all is compiled by now."""
    workdir = tmp_path_factory.mktemp("again") / "run"
    began = time.monotonic()
    run_command("--config", small, "--workdir", workdir)
    return workdir, time.monotonic() - began


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.mark.slow
def test_a_run_leaves_every_file_of_its_results(finished):
    workdir, out = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["name"] == "small" and config["ccu_plus"]["steps"] == 8
    assert {e["title"] for e in events(workdir, "stage_end")} == {
        "data",
        "report",
        *(f"seed 0: {method}" for method in METHODS),
    }
    assert all(e["failure"] is None for e in events(workdir, "stage_end"))
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    page, table = (
        (workdir / name).read_text("utf-8") for name in ("report.html", "table.md")
    )
    assert table in out and str(workdir / "report.html") in out
    for method in METHODS:
        assert f"| {method} |" in table and method in page
        assert (workdir / "outputs" / f"{method}-0.npz").is_file()
    assert not list(workdir.rglob("*.tmp"))
    assert not list(workdir.rglob("*.new"))
    assert [path.parent.name for path in workdir.glob("checkpoints/*/features")] == [
        "original-0"
    ]
    assert not list(workdir.glob("checkpoints/*/steps*")), "no longer needed"


@pytest.mark.slow
def test_results_have_every_promised_key(finished):
    found = rows(finished[0])
    assert [row["method"] for row in found] == list(METHODS)
    views = {"image", "text", "fused"}
    for row in found:
        assert (row["config"], row["seed"], row["metric"]) == ("small", 0, "accuracy")
        assert row["unlearn_set"] == {
            "rule": "random:0.1",
            "modality": "image",
            "count": row["counts"]["unlearn"],
            "pictures": row["counts"]["unlearn"],
            "near_duplicates": (near := row["unlearn_set"]["near_duplicates"]),
        }
        assert set(near) == set(predictions.SPLITS)
        assert near["retain"] == near["unseen"] == 0
        assert row["corruptions"] == {} and row["data"]["used"] == 1408
        seconds = row["seconds"]
        assert set(seconds) >= {"start", "steps", "unlearn", "compile", "evaluate"}
        assert seconds["unlearn"] == seconds["start"] + seconds["steps"]
        assert seconds["total"] >= seconds["unlearn"] > 0
        assert row["features"] == "stored"
        # Stored with the original, opened by others: no part of their own time.
        assert seconds["total"] >= seconds["unlearn"] + seconds["features"]
        assert (seconds["features"] > 0.01) >= (row["method"] == "original")
        assert set(row["scores"]) == set(predictions.SPLITS)
        for of_set in row["scores"].values():
            assert set(of_set) == views
            for scores in of_set.values():
                assert set(scores) >= {"accuracy", "macro_f1"}
                assert all(0 <= score <= 1 for score in scores.values())
        assert set(row["attack_auc"]) >= views
        assert all(0 <= auc <= 1 for auc in row["attack_auc"].values())
        assert set(row["device"]) >= {"kind", "count", "processes"}
        assert (row["device"]["count"], row["device"]["processes"]) == (1, 1)
        assert set(row["versions"]) >= {"ccu_jax", "jax"} and "commit" in row


@pytest.mark.slow
def test_the_edition_is_named_wherever_results_are_shown(finished):
    workdir, out = finished
    assert {row["edition"] for row in rows(workdir)} == {"clipart"}
    for text in (
        out,
        (workdir / "table.md").read_text("utf-8"),
        (workdir / "report.html").read_text("utf-8"),
    ):
        assert "clip art" in text.lower()


@pytest.mark.slow
def test_restored_checkpoints_say_what_the_stored_outputs_say(finished):
    import jax

    workdir, _ = finished
    model, data = _model(workdir)
    apply = jax.jit(model.apply)
    for method in METHODS:
        stored = predictions.load_predictions(workdir / "outputs" / f"{method}-0.npz")
        where = {name: place for place, name in enumerate(data.id.tolist())}
        rows = np.array([where[name] for name in stored.id.tolist()])
        names = ("image", "text", "has_image", "has_text")
        example = {name: np.asarray(getattr(data, name))[rows] for name in names}
        said = apply(weights(workdir, method), example)
        for view, logits in stored.logits.items():
            assert np.abs(logits).max() > 0
            np.testing.assert_allclose(getattr(said, view), logits, atol=1e-5)
        assert np.array_equal(stored.labels, data.labels[rows])


@pytest.mark.slow
def test_the_unlearn_set_is_stored_and_is_what_was_evaluated(finished):
    workdir, _ = finished
    lines = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    for method in METHODS:
        stored = predictions.load_predictions(workdir / "outputs" / f"{method}-0.npz")
        assert sorted(listed) == sorted(stored.id[stored.split == "unlearn"].tolist())
        assert len(set(stored.id.tolist())) == len(stored.id), "a row in two sets"
    assert {row["unlearn_set"]["count"] for row in rows(workdir)} == {len(listed)}


@pytest.mark.slow
def test_ccu_plus_leaves_the_texts_of_the_unlearn_set_as_they_were_to_the_bit(finished):
    workdir, _ = finished
    before, after, retrained = (
        predictions.load_predictions(workdir / "outputs" / f"{method}-0.npz")
        for method in ("original", "ccu_plus", "retrain_visual")
    )
    assert before.logits["text"].tobytes() == after.logits["text"].tobytes()
    assert before.logits["image"].tobytes() != after.logits["image"].tobytes()
    assert before.logits["text"].tobytes() != retrained.logits["text"].tobytes()
    told = {row["method"]: row["text_unchanged"] for row in rows(workdir)}
    assert told == {"original": True, "retrain_visual": False, "ccu_plus": True}
    old, new = weights(workdir, "original"), weights(workdir, "ccu_plus")
    for part in ("text", "text_projection", "text_head", "image_trunk"):
        for name, values in old[part].items():
            _assert_equal_trees(values, new[part][name])


def _assert_equal_trees(one, other):
    import jax

    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_finished_run_is_shown_again_without_training_or_tensorflow(
    small, finished, copy
):
    # Nothing is asked of the checkpoints of what is finished.
    shutil.rmtree(copy / "checkpoints" / "original-0")
    before = files(copy, "checkpoints", "outputs", "stages", "data", "unlearn_sets")
    code = (
        "import sys; from ccu_jax import launch\n"
        "code = launch.main(sys.argv[1:])\n"
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    num_old = len(events(copy, "stage_start"))
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(small), "--workdir", str(copy)],
        env=run_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (copy / "table.md").read_text("utf-8") in done.stdout
    assert rows(copy) == rows(finished[0])
    assert before == files(
        copy, "checkpoints", "outputs", "stages", "data", "unlearn_sets"
    )
    starts = [event["title"] for event in events(copy, "stage_start")]
    assert starts[num_old:] == ["data", "report"]


@pytest.mark.slow
def test_another_method_and_seed_are_all_that_is_run(small, copy):
    before = files(copy, "checkpoints", "outputs", "stages", "data", "unlearn_sets")
    num_old = len(events(copy, "stage_start"))
    argv = ["--config", small, "--workdir", copy, "--methods", "retrain"]
    run_command(*argv, "--seeds", "0,1")
    starts = [event["title"] for event in events(copy, "stage_start")][num_old:]
    assert starts == [
        "data",
        "seed 0: retrain",
        "seed 1: original",
        "seed 1: retrain",
        "report",
    ]
    after = files(copy, "checkpoints", "outputs", "stages", "data", "unlearn_sets")
    assert before.items() <= after.items()
    methods = [(row["seed"], row["method"]) for row in rows(copy)]
    assert methods == [
        (0, "original"),
        (0, "retrain"),
        (0, "retrain_visual"),
        (0, "ccu_plus"),
        (1, "original"),
        (1, "retrain"),
    ]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_again(finished, again):
    assert_same_bits(finished[0], again[0])


@pytest.mark.slow
def test_a_run_killed_after_its_checkpoint_but_before_its_record_ends_well(
    small, finished, copy
):
    (copy / "stages" / "ccu_plus-0.json").unlink()
    run_command("--config", small, "--workdir", copy)
    assert_same_bits(finished[0], copy)


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_exit_code_130(small, finished, copy):
    for folder in ("stages", "checkpoints", "outputs"):
        shutil.rmtree(copy / folder)
    num_old = len(events(copy, "stage_start"))
    process = start_command("--config", small, "--workdir", copy)
    _wait(lambda: len(events(copy, "stage_start")) > num_old + 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "stopped; rerun the same command to resume\n"
    assert "seed 0: original ..." in out and "done, 12/12" not in out
    run_command("--config", small, "--workdir", copy, "--methods", "original")
    assert_same_bits(finished[0], copy, ["original"])


def _wait(true, process, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_an_undisturbed_one(
    small, again, tmp_path
):
    undisturbed, seconds = again
    draw = random.Random(0)
    kills, in_a_method = 0, 0
    while kills < KILLS:
        workdir, done = tmp_path / f"after-{kills}", False
        argv = ["--config", small, "--workdir", workdir, "--methods", "ccu_plus"]
        while not done:
            process = start_command(*argv)
            if kills < KILLS:
                # Of three methods two are run; nothing happens in the first tenth,
                # while all is being imported.
                wait = draw.uniform(0.1, 0.7) * seconds
                _sleep(wait, process, workdir, kills % 2, draw)
                process.kill()
            _, err = process.communicate(timeout=400)
            done = process.returncode != -signal.SIGKILL
            kills += not done
            in_a_method += not done and bool(_steps(workdir))
        assert (process.returncode, err) == (0, ""), err[-2000:]
        assert_same_bits(undisturbed, workdir, ["original", "ccu_plus"])
    assert in_a_method, "no kill fell between two checkpoints of a method"


def _steps(workdir):
    """The checkpoints of methods that are not finished."""
    return set(workdir.glob("checkpoints/*/steps*/[0-9]*"))


def _sleep(seconds, process, workdir, aimed, draw):
    """Waits for so long; if aimed, for about the next checkpoint of a method."""
    before, end = _steps(workdir), time.monotonic() + seconds * (3 if aimed else 1)
    while process.poll() is None and time.monotonic() < end:
        if aimed and _steps(workdir) - before:
            return time.sleep(draw.uniform(0, 0.3))
        time.sleep(0.01)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_original_can_be_trained_again(
    small, finished, copy
):
    folder = copy / "checkpoints" / "original-0" / "params"
    largest = max(folder.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    largest.write_bytes(bytes(255 - byte for byte in largest.read_bytes()))
    (copy / "stages" / "ccu_plus-0.json").unlink()
    process = start_command("--config", small, "--workdir", copy)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, err
    record = copy / "stages" / "original-0.json"
    # Where data cannot even be decoded, threads of Orbax write text of their own, which
    # may have no end of line yet.
    told = re.findall(r"error: .*checkpoint of original.*", err)
    assert len(told) == 1 and str(folder) in told[0] and str(record) in told[0], err
    assert "is unusable" in out
    record.unlink()
    run_command("--config", small, "--workdir", copy)
    assert_same_bits(finished[0], copy)


@pytest.mark.slow
def test_another_unlearn_set_does_not_mix_with_finished_results(small, finished, copy):
    path = copy / "unlearn_sets" / "0.txt"
    *lines, _last = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines) + "\n", "utf-8")
    before = files(copy, "checkpoints", "outputs", "stages", "unlearn_sets")
    process = start_command("--config", small, "--workdir", copy)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert f"{path}: damaged or edited; remove it" in err
    assert before == files(copy, "checkpoints", "outputs", "stages", "unlearn_sets")
    path.write_text(add_line_checksum("\n".join(lines[:-1]) + "\n"), "utf-8")
    process = start_command("--config", small, "--workdir", copy)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert (
        "lists another unlearn set" in err and str(path) in err and "--workdir" in err
    )


@pytest.mark.slow
def test_data_that_have_changed_replace_nothing(finished, tmp_path):
    """Of pairs of one's own: one word more in one text."""
    folder, workdir = tmp_path / "own", tmp_path / "run"
    shutil.copytree(ROOT / "ccu_jax/data/clipart", folder)
    config = tmp_path / "small.py"
    config.write_text(SMALL_CONFIG)
    argv = ["--config", config, "--workdir", workdir, "--data-dir", folder]
    run_command(*argv, "--methods", "original")
    before = files(workdir, "checkpoints", "outputs", "stages", "data")
    pairs = folder / "pairs.jsonl"
    lines = pairs.read_text("utf-8").splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "text": "another " + row["text"]})
    pairs.write_text("\n".join(lines) + "\n", "utf-8")
    process = start_command(*argv, "--methods", "original")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert "have changed" in err and str(folder) in err and "--workdir" in err
    assert before == files(workdir, "checkpoints", "outputs", "stages", "data")


@pytest.mark.slow
def test_a_damaged_record_is_named(small, copy):
    record = copy / "stages" / "ccu_plus-0.json"
    record.write_text(record.read_text("utf-8")[:100], "utf-8")
    process = start_command("--config", small, "--workdir", copy)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert str(record) in err and "damaged" in err


MOVIES = """
import dataclasses
from ccu_jax.config import CcuPlus, Corruptions, Finetune, Model, Run, Train
from ccu_jax.config.loading import load_config

config = dataclasses.replace(
    load_config("NAME", ["data.sample_rows=240", "data.image_size=16"]),
    name="movies",
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


@pytest.mark.slow
def test_the_sample_edition_forgets_a_class_and_survives_a_method_that_diverges(
    tmp_path,
):
    config, workdir = tmp_path / "movies.py", tmp_path / "run"
    config.write_text(MOVIES.replace("NAME", "mmimdb"))
    argv = ["--config", config, "--workdir", workdir, "--unlearn", "class:Comedy"]
    out = run_command(*argv, "--methods", "retrain_visual,finetune,ccu_plus")
    loud = "Sample edition"
    assert loud in out and loud in (workdir / "table.md").read_text("utf-8")
    found = {row["method"]: row for row in rows(workdir)}
    assert {row["edition"] for row in found.values()} == {"sample"}
    assert found["original"]["unlearn_set"]["rule"] == "class:Comedy"
    assert all(found[name]["diverged"] is None for name in METHODS)
    assert found["ccu_plus"]["text_unchanged"] is True
    # What was still good is kept: here what it began with.
    broken = found["finetune"]
    assert broken["diverged"].startswith("step ")
    assert broken["diverged"].endswith("what it was at step 0 is kept")
    assert broken["scores"]["test"] == found["original"]["scores"]["test"]
    assert "finetune (diverged)" in out
    # The class is unlearned as a whole, and the control is of the same class.
    outputs = predictions.load_predictions(workdir / "outputs" / "ccu_plus-0.npz")
    of = {name: outputs.labels[outputs.split == name] for name in predictions.SPLITS}
    shared = np.flatnonzero(of["unlearn"].all(axis=0))
    assert len(shared) == 1 and of["unseen"][:, shared].all()
    assert not of["retain"][:, shared].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fashion200k", "hatefulmemes", "medical", "satellite"]
)
def test_every_sample_edition_runs_from_a_fresh_folder_and_can_be_purged(
    name, tmp_path
):
    config, workdir = tmp_path / "movies.py", tmp_path / "run"
    config.write_text(MOVIES.replace("NAME", name))
    argv = ["--config", config, "--workdir", workdir, "--methods", "ccu_plus"]
    out = run_command(*argv, "--purge")
    assert "Sample edition" in out and ": 0 found" in out
    found = rows(workdir)
    assert {row["edition"] for row in found} == {"sample"}
    metric = {"hatefulmemes": "auroc", "medical": "micro_f1"}.get(name, "accuracy")
    for row in found:
        assert row["metric"] == metric
        assert 0 <= row["scores"]["test"]["fused"][metric] <= 1
        asked = {"missing_image", "missing_text", "incomplete"}
        asked |= {"noisy_labels", "noisy_text"}
        assert {k for k, v in row["corruptions"].items() if k in asked} == asked
        assert all(row["corruptions"][condition]["rows"] > 5 for condition in asked)
        assert row["corruptions"]["order"] == "stored"
        assert row["data"]["used"] == row["data"]["read"] == 240
    assert json.loads((workdir / "purge.json").read_text())["hits"] == []


@pytest.mark.slow
def test_after_a_purge_results_are_shown_and_nothing_else_is_run(small, copy):
    argv = ["--config", small, "--workdir", copy]
    before = files(copy, "outputs", "checkpoints", "stages")
    features = stored(copy)
    out = run_command(*argv, "--purge")
    told = json.loads((copy / "purge.json").read_text())
    ids = (copy / "unlearn_sets" / "0.txt").read_text().split("\n")
    count = sum(not line.startswith("#") for line in ids if line)
    assert told["num_images"] >= count > 50 and told["hits"] == []
    assert f"purged {told['num_images']} images" in out
    after = files(copy, "outputs", "checkpoints", "stages")
    changed = {str(path) for path in before if before[path] != after.get(path)}
    # The original itself is gone: it was trained on them.
    gone = {path.as_posix().partition("/params/")[0] for path in before.keys() - after}
    assert gone == {"checkpoints/original-0"} and told["models"] == 1
    assert not (copy / "checkpoints" / "original-0" / "params").exists()
    changed &= {str(path) for path in after}
    assert {path.rpartition("/")[0] for path in changed} == {
        "checkpoints/original-0/features"
    }
    _assert_features_are_gone(copy, features, told)
    from ccu_jax.errors import UserError
    from ccu_jax.inference import load_classifier

    with pytest.raises(UserError, match="purged"):
        load_classifier(copy, "original")
    assert load_classifier(copy, "ccu_plus").classes
    assert "| ccu_plus |" in run_command(*argv)
    for more in (["--seeds", "0,1"], ["--audit", "standard"]):
        process = start_command(*argv, *more)
        _, err = process.communicate(timeout=400)
        assert process.returncode == 2 and err.count("\n") == 1, err
        assert "were purged" in err and "another --workdir" in err


def _assert_features_are_gone(workdir, before, told):
    """Of the forgotten rows, and of their near-duplicates, and of no others."""
    ids = _model(workdir)[1].id.tolist()
    listed = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").split("\n")
    asked = [ids.index(name) for name in listed if name and not name.startswith("#")]
    after = stored(workdir)
    assert before.keys() == after.keys()
    gone = np.frombuffer(after["there.bin"], bool) == 0
    assert gone[asked].all() and gone.sum() == told["features"] < len(ids)
    for name in after.keys() - {"about.json", "there.bin"}:
        old, new = (
            np.frombuffer(x[name], np.uint8).reshape(len(ids), -1)
            for x in (before, after)
        )
        assert not new[gone].any() and old[gone].any(axis=1).all(), name
        np.testing.assert_array_equal(new[~gone], old[~gone])


def test_a_run_needs_no_tensorflow_to_be_imported():
    code = "import sys, ccu_jax.experiments.run; print('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=run_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["original", "ccu_plus"])
def test_a_model_of_a_run_can_be_loaded_and_says_what_was_stored(finished, method):
    from ccu_jax.inference import load_classifier

    stored = predictions.load_predictions(finished[0] / "outputs" / f"{method}-0.npz")
    folder = ROOT / "ccu_jax" / "data" / "clipart"
    lines = (folder / "pairs.jsonl").read_text("utf-8").splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    some = np.flatnonzero(stored.split == "test")[:70]
    chosen = [rows[i] for i in stored.id[some]]
    loaded = load_classifier(finished[0], method)
    images = [folder / row["image"] for row in chosen]
    images[0] = images[0].read_bytes()
    said = loaded.predict_probabilities(images, [row["text"] for row in chosen])
    for view, logits in stored.logits.items():
        odds = np.exp(logits[some].astype(float))
        expected = odds / odds.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(said[view], expected, atol=1e-4)
    # Alone, a picture is seen as such in all views that look at it.
    alone = loaded.predict_probabilities(images[:1], [None])
    np.testing.assert_allclose(alone["image"], said["image"][:1], atol=1e-6)
    np.testing.assert_allclose(alone["fused"].sum(), 1)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_named(finished, copy, tmp_path):
    from ccu_jax.errors import UserError
    from ccu_jax.inference import load_classifier

    with pytest.raises(UserError, match="no finished scrub of seed 0; choose from: cc"):
        load_classifier(finished[0], "scrub")
    with pytest.raises(UserError, match="choose from: none"):
        load_classifier(tmp_path)
    (meta,) = copy.glob("checkpoints/ccu_plus-0/params/*/meta/metadata")
    meta.write_bytes(meta.read_bytes()[:-9])
    remedy = f"missing or damaged .*; remove {copy}/stages/ccu_plus-0.json and rerun"
    with pytest.raises(UserError, match=remedy):
        load_classifier(copy)
    loaded = load_classifier(finished[0])
    with pytest.raises(UserError, match="image: unusable: not an image"):
        loaded.predict_probabilities([b"words"], [None])
    with pytest.raises(UserError, match="1 images but 2 texts"):
        loaded.predict_probabilities([None], ["one", "two"])
    assert loaded.predict_probabilities([], [])["fused"].shape == (0, 10)


@pytest.mark.slow
def test_every_run_is_audited_and_the_tiers_go_on_where_they_were(small, copy):
    found = json.loads((copy / "audit.json").read_text())
    assert [method["method"] for method in found] == list(METHODS)
    assert set(found[0]["seeds"][0]["seconds"]) == {"smoke"}
    argv = ("--config", small, "--workdir", copy, "--audit")
    run_command(*argv, "standard")
    found = {m["method"]: m for m in json.loads((copy / "audit.json").read_text())}
    assert set(found) == {*METHODS, "retrain_visual_2"}
    for method in found.values():
        (record,) = method["seeds"]
        assert set(record["seconds"]) == {"smoke", "standard"}
        assert set(record["cka"]) == {"original", "reference"}
        assert record["attacks"]["image"]["loss"]["control"] is not None
        assert record["relearning"]["most"] == 100
    assert found["original"]["seeds"][0]["relearning"]["steps"] == 0
    assert found["original"]["seeds"][0]["within_class"]["original"][0] > 0.999
    before = files(copy, "audits", "checkpoints")
    argv = ("--shadows", "6", *argv)
    out = run_command(*argv, "rigorous")
    assert "audit, rigorous: about" in out
    after = files(copy, "audits", "checkpoints")
    assert before.items() <= after.items()
    found = {m["method"]: m for m in json.loads((copy / "audit.json").read_text())}
    for name, method in found.items():
        pool = method["seeds"][0]["pool"]["image"]
        assert pool["shadows"] == 6 and 0 <= pool["lira"]["auc"][0] <= 1
        assert (pool["ulira"] is None) == (name != "ccu_plus")
    pool = found["ccu_plus"]["seeds"][0]["pool"]["image"]
    compared = {"model", "original", "retrain_visual", "retrain_visual_2"}
    assert set(pool["ulira_of"]) == compared
    assert all(
        x["auc"] is not None for x in (pool["ulira"], *pool["ulira_of"].values())
    )
    # Time of the shadows is told once.
    took = [m["seeds"][0]["costs_s"]["shadow models"] for m in found.values()]
    assert took[0] > 0 and not any(took[1:])
    # Without measuring what was measured is shown, from the records and from no table.
    word = found["original"]["verdict"]["word"]
    told = (copy / "report.html").read_text("utf-8")
    (copy / "audit.json").write_text('[{"mathod": "original"}]')
    run_command(*argv[2:], "none")
    assert (copy / "report.html").read_text("utf-8") == told and word in told
    page = (copy / "audit.md").read_text("utf-8")
    assert "Clip art" in page and all(f"**{name}**" in page for name in found)
    # Nothing is done twice; what is damaged is made again, and another pool is another.
    (copy / "audits" / "ccu_plus-0-rigorous.json").write_text("{}")
    said = sorted(copy.glob("shadows/0/ccu_plus-1-*.npz"))
    said[0].write_bytes(said[0].read_bytes()[:1000])
    kept = files(copy, "shadows/0/0", "shadows/0/5")
    out = run_command(*argv, "rigorous")
    assert f"{said[0]}: missing or damaged" in out
    again = json.loads((copy / "audits" / "ccu_plus-0-rigorous.json").read_text())
    assert again["result"]["pool"]["image"] == pool
    run_command(*argv[2:], "rigorous", "--shadows", "8")
    assert kept == files(copy, "shadows/0/0", "shadows/0/5")
    found = {m["method"]: m for m in json.loads((copy / "audit.json").read_text())}
    assert found["ccu_plus"]["seeds"][0]["pool"]["image"]["shadows"] == 8
    # A table that cannot be made for want of outputs says so, and what to do.
    (copy / "outputs" / "ccu_plus-0.npz").write_bytes(b"PK")
    process = start_command("--config", small, "--workdir", copy)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert "ccu_plus-0.npz: missing or damaged" in err and "ccu_plus-0.json" in err


@pytest.mark.slow
def test_a_run_that_is_told_to_leave_saves_its_steps_and_goes_on(
    small, finished, tmp_path
):
    workdir = tmp_path / "run"
    argv = ("--config", small, "--workdir", workdir)
    # No checkpoint but the one that is saved because of the signal.
    argv = (*argv, "--set", "run.checkpoint_steps=1000")
    process = start_command(*argv)
    seen = workdir / "events.jsonl"
    begun = '"kind": "stage_start", "title": "seed 0: original"'
    while not (seen.exists() and begun in seen.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in err, err
    assert "Traceback" not in err
    run_command(*argv)
    assert_same_bits(finished[0], workdir)


@pytest.mark.slow
def test_two_runs_on_one_folder_refuse_each_other(small, finished, copy):
    (copy / "stages" / "ccu_plus-0.json").unlink()
    with (copy / "run.lock").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(b"process 7 on a-host\n")
        file.flush()
        before = files(copy, "checkpoints", "outputs", "stages", "unlearn_sets")
        process = start_command("--config", small, "--workdir", copy)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 75 and err.count("\n") == 1, err
        assert "locked by another run" in err and "process 7 on a-host" in err
        assert before == files(copy, "checkpoints", "outputs", "stages", "unlearn_sets")
    # A lock goes with who had it.
    run_command("--config", small, "--workdir", copy)
    assert_same_bits(finished[0], copy)
