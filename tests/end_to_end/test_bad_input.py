"""Wrong input: one line that names the thing and the remedy, before any training."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ccu_jax import launch
from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Config, to_json
from ccu_jax.methods import METHODS
from ccu_jax.storage.records import add_checksum

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from ccu_jax.config import Config, Data, Model, Train

config = Config(
    name="own",
    data=Data(image_size=8, text_length=6, vocabulary=120, dir={folder!r}),
    model=Model(patch=4, image_width=8, image_depth=1, text_width=8, text_depth=1,
                heads=2, embed_dim=4),
    train=Train(epochs=1, batch=16),
    methods=("original",),
)
"""
DEVICES = 8  # see conftest.py


def _pictures(folder):
    """Writes 40 rows of one's own: two classes, half of them for training."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for row in range(40):
        pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        entry = {"id": f"row{row}", "image": f"{row}.png", "text": f"text of {row}"}
        entry["label"] = "cat" if row % 2 else "dog"
        entry["split"] = ["train", "train", "validation", "test"][row // 2 % 4]
        lines.append(entry)
    # A class that no training row has.
    lines[4]["label"] = "emu"
    _write(folder, lines)
    return lines


def _write(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text)


@pytest.fixture
def rows(tmp_path):
    return _pictures(tmp_path / "pictures")


@pytest.fixture
def config(tmp_path, rows):
    """The config file, in the folder where the command is given."""
    path = tmp_path / "own.py"
    path.write_text(CONFIG.format(folder=str(tmp_path / "pictures")))
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Each test has an environment and a folder of its own, with earlier results."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # Keeps `main` from changing JAX's settings in this process.
    monkeypatch.setitem(os.environ, "JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "out"
    (workdir / "outputs").mkdir(parents=True)
    for name in ("results.json", "table.md", "outputs/original-0.npz"):
        (workdir / name).write_text(f"an earlier {name}")


def _results(workdir):
    """All files but those that may change before the first step: data, log, lock."""
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file()
        and path.relative_to(workdir).parts[0].partition(".")[0]
        not in ("data", "events", "records", "run", "sample")
    }


def refused(capsys, *argv, workdir="out"):
    """Runs the command, which must be refused in one line and change no result."""
    before = _results(pathlib.Path(workdir))
    code = launch.main([*map(str, argv), "--workdir", workdir])
    out, err = capsys.readouterr()
    assert code == 2, out
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in out + err
    assert _results(pathlib.Path(workdir)) == before
    return err, out


def assert_named(message, *words):
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--config tinny", "'tinny' 'tiny'?"),
        ("--config own.py --set train.epoch=3", "'epoch' 'epochs'?"),
        ("--config own.py --set train.batch=many", "train.batch 'many' whole"),
        ("--config own.py --set train.batch=1.5", "train.batch '1.5' whole"),
        ("--config own.py --set train.learning_rate=nan", "learning_rate number"),
        ("--config own.py --set train.flip=perhaps", "train.flip 'perhaps' true false"),
        ("--config own.py --methods ccu_pls", "'ccu_pls' 'ccu_plus'?"),
        ("--config own.py --set run.executor=pmapp", "run.executor 'pmapp' shard_map"),
        ("--config own.py --set run.features=store", "run.features 'store' stored"),
        ("--config own.py --set run.features=compute", "'compute' stored computed"),
        (
            "--config own.py --set run.image_placement=disk",
            "run.image_placement 'disk' device host",
        ),
        ("--config own.py --set model.remat=perhaps", "model.remat 'perhaps' true"),
        ("--config own.py --set model.dtype=float33", "model.dtype 'float33' bfloat16"),
        ("--config own.py --set data.dataset=paris", "data.dataset 'paris' pairs"),
        ("--config own.py --set corruptions.order=stord", "order 'stord' 'stored'?"),
        ("--config own.py --set unlearn.duplicates=keep", "'keep' forget report"),
        ("--config own.py --set cf_head.layers=all", "cf_head.layers 'all' head tail"),
        ("--config own.py --audit smoke --tune 2", "--tune --audit"),
        ("--config own.py --audit rigorous --shadows 6 --ablate", "--ablate --shadows"),
        ("--config own.py --audit standard --shadows 6", "--shadows --audit rigorous"),
        ("--config own.py --audit strict", "--audit 'strict' 'smoke' 'rigorous'"),
        ("--config own.py --audit rigorous --shadows 7", "--shadows '7' even"),
        ("--config own.py --audit rigorous --shadows 4", "--shadows '4' least 6"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(config, capsys, argv, words):
    message, _ = refused(capsys, *argv.split())
    assert_named(message, *words.split())


@pytest.mark.parametrize("rule", ["random:2", "half", "ids:nowhere.txt"])
def test_a_wrong_rule_is_refused_before_any_data_are_read(config, capsys, rule):
    message, out = refused(capsys, "--config", "own.py", "--unlearn", rule)
    assert_named(message, rule.partition(":")[2] or rule)
    assert not out and not pathlib.Path("out", "data").exists()


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("train.epochs", "0", "at least 1|above 0"),
        ("train.epochs", "-3", "at least 1|above 0"),
        ("train.batch", "0", "at least 1"),
        ("train.batch", "-8", "at least 1"),
        ("train.learning_rate", "-0.1", "above 0"),
        ("train.learning_rate", "0", "above 0"),
        ("train.weight_decay", "-1", "at least 0"),
        ("train.warmup_fraction", "1.5", "below 1"),
        ("train.word_dropout", "1.5", "at most 1"),
        ("train.modality_dropout", "-0.5", "at least 0"),
        ("train.label_smoothing", "2", "below 1"),
        ("train.temperature", "0", "above 0"),
        ("train.shift", "-1", "at least 0"),
        ("model.dropout", "1.5", "below 1"),
        ("model.dropout", "1", "below 1"),
        ("model.patch", "0", "at least 1"),
        ("model.heads", "0", "at least 1"),
        ("model.embed_dim", "0", "at least 1"),
        ("model.image_depth", "0", "at least 1"),
        ("model.image_depth", "-1", "at least 1"),
        ("unlearn.num_requests", "0", "at least 1"),
        ("unlearn.holdout_fraction", "0", "above 0 and below 1"),
        ("unlearn.holdout_fraction", "1", "above 0 and below 1"),
        ("unlearn.holdout_fraction", "-0.2", "above 0 and below 1"),
        ("finetune.epochs", "0", "above 0"),
        ("neggrad_plus.retain_weight", "1.1", "at most 1"),
        ("scrub.temperature", "0", "above 0"),
        ("ccu.steps", "0", "at least 1"),
        ("ccu.check_every", "0", "at least 1"),
        ("ccu.unlearn_batch", "0", "at least 1"),
        ("ccu_plus.steps", "-1", "at least 1"),
        ("ccu_plus.refresh_every", "0", "at least 1"),
        ("ccu_plus.shrink", "1.1", "at most 1"),
        ("run.steps_per_call", "0", "at least 1"),
        ("run.checkpoint_steps", "0", "at least 1"),
        ("run.evaluate_batch", "0", "at least 1"),
        ("data.image_size", "0", "4"),
        ("data.text_length", "1", "2"),
        ("data.vocabulary", "1", "100"),
        ("data.test_fraction", "1.5", "below 1"),
        ("data.validation_fraction", "-0.1", "at least 0"),
    ],
)
def test_an_absurd_number_is_refused_with_what_it_must_be(
    config, capsys, key, value, words
):
    message, _ = refused(capsys, "--config", config, "--set", f"{key}={value}")
    assert_named(message, key, f"{float(value):g}")
    assert any(word in message for word in words.split("|")), message


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("model.heads=3", "model.image_width=8 model.heads=3"),
        ("model.patch=3", "data.image_size=8 model.patch=3"),
        ("model.tail_blocks=2", "model.tail_blocks=2 model.image_depth=1"),
        ("model.tail_blocks=-1", "model.tail_blocks=-1 at least 0"),
        ("model.text_width=9", "model.text_width=9 model.heads=2"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_both_named(
    config, capsys, overrides, words
):
    message, _ = refused(capsys, "--config", config, "--set", overrides)
    assert_named(message, *words.split())


def test_data_that_are_not_there_are_named(config, capsys):
    message, _ = refused(capsys, "--config", config, "--data-dir", "nowhere")
    assert_named(message, "data.dir", "nowhere")
    pathlib.Path("empty").mkdir()
    message, _ = refused(capsys, "--config", config, "--data-dir", "empty")
    assert_named(message, "data.dir", "empty", "pairs.jsonl", '"label"')


def test_a_half_unpacked_mmimdb_is_told_with_the_remedy(config, capsys, tmp_path):
    folder = tmp_path / "mmimdb"
    argv = ["--config", config, "--set", "data.dataset=mmimdb", "--data-dir", folder]
    (folder / "dataset").mkdir(parents=True)
    message, _ = refused(capsys, *argv)
    assert_named(message, str(folder), "split.json")
    ids = [f"{number:07}" for number in range(30)]
    split = {"train": ids[:20], "dev": ids[20:25], "test": ids[25:]}
    (folder / "split.json").write_text(json.dumps(split))
    for name in ids[:5]:
        (folder / "dataset" / f"{name}.json").write_text("{}")
        (folder / "dataset" / f"{name}.jpeg").write_bytes(b"")
    message, _ = refused(capsys, *argv)
    assert_named(message, "lacks 25 of the 30", "unpack mmimdb.tar.gz again")


def test_a_broken_picture_is_counted_or_refused_when_strict(config, capsys, tmp_path):
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    # So that it ends after the data.
    wrong = ["--config", config, "--unlearn", "class:nobody"]
    message, out = refused(capsys, *wrong)
    assert "read 40, skipped: not an image 1, used 39" in out
    message, _ = refused(capsys, *wrong, "--set", "data.strict=true")
    assert_named(message, "line 2 (row1): not an image", "data.strict=False")


@pytest.mark.parametrize(
    "ids, words",
    [
        ("row0\nrow999\n", "'row999' does not have"),
        ("row0\nrow1\nrow0\n", "'row0' more than once"),
        ("row0\nrow6\n", "'row6' test remove"),
        ("row4\n", "'row4' validation remove"),
        ("", "nothing to forget"),
        ("# nothing but words\n\n", "nothing to forget"),
    ],
)
def test_a_wrong_list_of_rows_to_forget_is_refused(config, capsys, ids, words):
    pathlib.Path("ids.txt").write_text(ids)
    message, _ = refused(capsys, "--config", config, "--unlearn", "ids:ids.txt")
    assert_named(message, "ids.txt", *words.split())


def test_forgetting_all_that_was_trained_is_refused(config, rows, capsys):
    ids = [row["id"] for row in rows if row["split"] == "train"]
    pathlib.Path("ids.txt").write_text("\n".join(ids))
    message, _ = refused(capsys, "--config", config, "--unlearn", "ids:ids.txt")
    assert_named(message, "every training row", "train a new model")


@pytest.mark.parametrize(
    "rule, words",
    [
        ("random:0", "random:0 between 0 and 1"),
        ("random:1.5", "random:1.5 between 0 and 1"),
        ("random:1", "random:1 between 0 and 1"),
        ("random:-0.1", "random:-0.1 between 0 and 1"),
        ("random:nan", "random:nan between 0 and 1"),
        ("random:much", "random:much between 0 and 1"),
        ("random", "'random' random:SHARE class:NAME ids:FILE"),
        ("all:1", "'all:1' random:SHARE class:NAME ids:FILE"),
        ("class:nobody", "class:nobody no such class cat, dog, emu"),
        ("class:emu", "class:emu nothing to forget"),
        ("ids:nowhere.txt", "cannot read nowhere.txt"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(config, capsys, rule, words):
    message, _ = refused(capsys, "--config", config, "--unlearn", rule)
    assert_named(message, *words.split())


def test_what_a_later_seed_has_wrong_is_found_before_the_first_seed(
    config, rows, capsys
):
    # Few rows of a class: some seeds have one of them in the control, others none.
    rare = [row for row in rows if row["split"] == "train"][:3]
    for row in rare:
        row["label"] = "yak"
    _write(pathlib.Path("pictures"), rows)
    argv = ["--config", config, "--unlearn", "class:yak", "--seeds"]
    from ccu_jax import data
    from ccu_jax.unlearn_sets import splits as unlearn_set

    own = load_config(str(config)).data
    loaded = data.load(own, pathlib.Path("look"), lambda *told: None)

    def works(seed):
        try:
            return bool(unlearn_set.draw_sets(loaded, "class:yak", seed, 0.18))
        except launch.UserError:
            return False

    good = next(seed for seed in range(99) if works(seed))
    bad = next(seed for seed in range(99) if not works(seed))
    message, out = refused(capsys, *argv, f"{good},{bad}")
    assert_named(message, "class:yak", "unseen")
    assert "original" not in out, "it was trained before"


def _batches():
    tree = Config()
    for method in METHODS:
        name = method if hasattr(tree, method) else "train"
        for field in vars(getattr(tree, name)):
            if field.endswith("batch"):
                yield method, f"{name}.{field}"


@pytest.mark.parametrize("method, key", list(_batches()))
def test_a_batch_that_the_devices_cannot_share_is_found_before_any_training(
    config, capsys, method, key
):
    argv = ["--config", config, "--methods", method, "--set", f"{key}=12"]
    message, out = refused(capsys, *argv)
    assert_named(message, f"{key}=12", f"{DEVICES} devices", f"--set {key}=16")
    assert out == ""


def test_what_an_audit_cannot_be_asked_of_is_found_before_any_training(config, capsys):
    argv = ["--config", config, "--audit"]
    message, out = refused(capsys, *argv, "standard", "--set", "finetune.batch=12")
    assert_named(message, "finetune.batch=12", f"{DEVICES} devices")
    assert out == ""
    message, out = refused(capsys, *argv, "rigorous", "--set", "unlearn.num_requests=2")
    assert_named(message, "--audit rigorous", "unlearn.num_requests=2")
    assert out == ""


def test_every_method_has_its_batches_checked():
    # A closed form goes through its rows in chunks of its own.
    assert {method for method, _ in _batches()} == set(METHODS) - {"ssd"}
    keys = {key for _, key in _batches()}
    tree = to_json(Config())
    sections = [name for name, section in tree.items() if isinstance(section, dict)]
    every = {f"{name}.{field}" for name in sections for field in tree[name]}
    rest = {key for key in every if key.endswith("batch")} - keys
    assert rest == {"run.evaluate_batch"}, "it is rounded up by itself"


@pytest.mark.slow
def test_three_devices_cannot_share_a_batch_of_sixteen(config):
    argv = ["--config", str(config), "--workdir", "new", "--devices", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "ccu_jax.launch", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert_named(done.stderr, "train.batch=16", "3 devices", "--set train.batch=18")
    assert not any(pathlib.Path("new").iterdir())


def test_the_workdir_of_another_configuration_is_refused(config, capsys):
    theirs = to_json(load_config(str(config), ["train.epochs=7"]))
    pathlib.Path("out/config.json").write_text(json.dumps(add_checksum(theirs)))
    message, _ = refused(capsys, "--config", config)
    assert_named(message, "/out", "train.epochs", "--workdir")
    message, _ = refused(capsys, "--config", config, "--set", "unlearn.rule=class:cat")
    assert_named(message, "unlearn.rule", "train.epochs")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"own"', "\x00\x01", "{}"])
def test_a_workdir_with_a_damaged_config_is_refused(config, capsys, text):
    pathlib.Path("out/config.json").write_text(text)
    message, _ = refused(capsys, "--config", config)
    assert_named(message, "/out", "--workdir", "config.json", "damaged: remove it")


def test_a_mistake_does_not_claim_the_workdir(config, capsys, tmp_path):
    """Else the corrected command would be refused as another configuration's."""
    for argv in (
        ["--data-dir", "nowhere"],
        ["--unlearn", "class:nobody"],
        ["--set", "model.heads=3"],
    ):
        refused(capsys, "--config", config, *argv)
        assert not pathlib.Path("out/config.json").exists(), argv


def test_a_file_in_the_way_of_the_workdir_is_named(config, capsys):
    pathlib.Path("file").write_text("precious")
    for workdir in ("file", "file/below"):
        message = refused(capsys, "--config", config, workdir=workdir)[0]
        assert_named(message, workdir, "--workdir")
    assert pathlib.Path("file").read_text() == "precious"


def test_a_data_folder_of_the_users_own_in_the_workdir_is_left_alone(config, capsys):
    """Raw data often lie in a folder of this name, beside which one works."""
    own = pathlib.Path("out/data/precious.txt")
    own.parent.mkdir()
    own.write_text("precious")
    message, _ = refused(capsys, "--config", config)
    assert_named(message, "out/data", "in the way", "--workdir")
    assert own.read_text() == "precious"
