"""Invalid input is rejected in one line that names key and remedy, before training."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from ccu_jax import data, launch
from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Config, to_json
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS
from ccu_jax.storage.records import add_checksum
from ccu_jax.unlearn_sets import splits
from tests.end_to_end.launching import SMALL_CONFIG

CONFIG = SMALL_CONFIG.replace("batch=64", "batch=16").replace(
    "vocabulary=120", 'vocabulary=120, dir="images"'
)


def write_rows(rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    pathlib.Path("images", "pairs.jsonl").write_text("".join(lines))


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Changes to a folder with a config file, and results of an earlier run in "out".

    The environment is restored afterwards.
    """
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # Keeps `main` from changing JAX's settings in this process.
    monkeypatch.setitem(os.environ, "JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(CONFIG)
    workdir = tmp_path / "out"
    (workdir / "outputs").mkdir(parents=True)
    for name in ("results.json", "table.md", "outputs/original-0.npz"):
        (workdir / name).write_text(f"an earlier {name}")
    return workdir


@pytest.fixture
def rows(workdir):
    """Writes 40 rows with images: two classes, half of them for training."""
    for folder in ("images", "empty"):
        (workdir.parent / folder).mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(f"images/{number}.png")
        row = {"id": f"row{number}", "image": f"{number}.png", "text": f"of {number}"}
        row["label"] = "cat" if number % 2 else "dog"
        row["split"] = ["train", "train", "validation", "test"][number // 2 % 4]
        rows.append(row)
    rows[4]["label"] = "emu"  # a class without training rows
    write_rows(rows)
    return rows


def _read_results(workdir):
    """Reads all files but those that may change before training: data, log, lock."""
    ignored = ("data", "events", "records", "run", "sample")
    paths = [path for path in workdir.rglob("*") if path.is_file()]
    files = {path.relative_to(workdir): path.read_bytes() for path in paths}
    return {x: files[x] for x in files if x.parts[0].partition(".")[0] not in ignored}


@pytest.fixture
def reject(workdir, capsys):
    """Runs a command that must fail with one line and change no result."""

    def reject(*argv, words):
        """Returns what was printed before the error, which must have all words."""
        before = _read_results(workdir)
        code = launch.main(["--config", "own.py", "--workdir", "out", *argv])
        out, err = capsys.readouterr()
        assert code == 2, out
        assert err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n"
        assert "Traceback" not in out + err
        assert _read_results(workdir) == before
        assert all(word in err for word in words.split()), err
        return out

    return reject


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--audit smoke --tune 2", "--tune --audit"),
        ("--audit rigorous --shadows 6 --ablate", "--ablate --shadows"),
        ("--audit standard --shadows 6", "--shadows --audit rigorous"),
        ("--audit strict", "--audit 'strict' 'smoke' 'rigorous'"),
        ("--audit rigorous --shadows 7", "--shadows '7' even"),
        ("--audit rigorous --shadows 4", "--shadows '4' least 6"),
        ("--unlearn random:2", "random:2"),
        ("--unlearn ids:nowhere.txt", "cannot read nowhere.txt"),
        ("--set run.features=compute", "run.features 'compute' stored computed"),
        ("--set run.image_placement=disk", "image_placement 'disk' device host"),
        ("--set model.dtype=float33", "model.dtype 'float33' bfloat16"),
        ("--set corruptions.order=stord", "order 'stord' 'stored'?"),
        ("--set unlearn.duplicates=keep", "'keep' forget report"),
        ("--set cf_head.layers=all", "cf_head.layers 'all' head tail"),
        ("--audit standard --set finetune.batch=12", "finetune.batch=12 8 devices"),
        (
            "--audit rigorous --set unlearn.num_requests=2",
            "--audit unlearn.num_requests=2",
        ),
    ],
)
def test_invalid_flag_is_rejected_before_data_are_read(reject, workdir, argv, words):
    assert reject(*argv.split(), words=words) == ""
    assert not (workdir / "data").exists()


OUT_OF_RANGE = {
    "at least 0": "train.weight_decay=-1 train.modality_dropout=-0.5 train.shift=-1 "
    "data.validation_fraction=-0.1 model.tail_blocks=-1",
    "above 0": "train.learning_rate=0 train.temperature=0 "
    "finetune.epochs=0 scrub.temperature=0 unlearn.holdout_fraction=0",
    "at most 1": "train.word_dropout=1.5 neggrad_plus.retain_weight=1.1 "
    "ccu_plus.shrink=1.1",
    "below 1": "train.warmup_fraction=1.5 train.label_smoothing=2 model.dropout=1 "
    "data.test_fraction=1.5 unlearn.holdout_fraction=1",
    "at least 1": "train.epochs=0 train.batch=-8 model.patch=0 model.heads=0 "
    "model.embed_dim=0 model.image_depth=0 unlearn.num_requests=0 ccu.steps=0 "
    "ccu.check_every=0 ccu.unlearn_batch=0 ccu_plus.steps=-1 run.evaluate_batch=0 "
    "ccu_plus.refresh_every=0 run.steps_per_call=0 run.checkpoint_steps=0",
    "at least 2": "data.text_length=1",
    "at least 4": "data.image_size=0",
    "at least 100": "data.vocabulary=1",
}


def test_setting_out_of_range_is_rejected_with_its_bound():
    for bound, settings in OUT_OF_RANGE.items():
        for setting in settings.split():
            with pytest.raises(UserError, match=f"{setting}: must be .*{bound}"):
                load_config("own.py", [setting])


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--set data.dataset=paris", "data.dataset 'paris' pairs"),
        ("--set model.heads=3", "model.image_width=8 model.heads=3"),
        ("--set model.patch=3", "data.image_size=8 model.patch=3"),
        ("--set model.tail_blocks=2", "model.tail_blocks=2 model.image_depth=1"),
        ("--set model.text_width=9", "model.text_width=9 model.heads=2"),
        ("--unlearn class:nobody", "class:nobody no such class cat, dog, emu"),
        ("--unlearn class:emu", "class:emu selects no training row"),
        ("--data-dir nowhere", "data.dir nowhere"),
        ("--data-dir empty", 'data.dir empty pairs.jsonl "label"'),
    ],
)
def test_flag_that_does_not_fit_data_is_rejected(rows, reject, workdir, argv, words):
    reject(*argv.split(), words=words)
    # Otherwise the corrected command would be rejected as another configuration.
    assert not (workdir / "config.json").exists()


def test_damaged_image_is_counted_or_rejected_when_strict(rows, reject):
    pathlib.Path("images/1.png").write_bytes(b"not an image")
    argv = ("--unlearn", "class:nobody")  # fails once the data are read
    out = reject(*argv, words="class:nobody")
    assert "read 40, skipped: not an image 1, used 39" in out
    words = "line 2 (row1): not an image data.strict=False"
    reject(*argv, "--set", "data.strict=true", words=words)


def test_problem_of_a_later_seed_is_found_before_training(rows, reject):
    # Few rows of a class: only with some seeds is one of them held out.
    for row in [row for row in rows if row["split"] == "train"][:3]:
        row["label"] = "yak"
    write_rows(rows)
    settings = load_config("own.py").data
    loaded = data.load(settings, pathlib.Path("look"), lambda *progress: None)

    def is_valid(seed):
        try:
            return bool(splits.draw_sets(loaded, "class:yak", seed, 0.18))
        except UserError:
            return False

    valid = next(seed for seed in range(99) if is_valid(seed))
    invalid = next(seed for seed in range(99) if not is_valid(seed))
    argv = ("--unlearn", "class:yak", "--seeds", f"{valid},{invalid}")
    out = reject(*argv, words="class:yak unseen")
    assert "original" not in out, "it was trained before"


def _find_batch_keys(section, prefix):
    for key, value in vars(section).items():
        if hasattr(value, "__dataclass_fields__"):
            yield from _find_batch_keys(value, f"{prefix}{key}.")
        elif key.endswith("batch"):
            yield prefix + key


def _list_method_batches():
    config = Config()
    for method in METHODS:
        name = method if hasattr(config, method) else "train"
        for key in _find_batch_keys(getattr(config, name), f"{name}."):
            yield method, key


@pytest.mark.parametrize("method, key", list(_list_method_batches()))
def test_batch_that_devices_cannot_divide_is_rejected(reject, method, key):
    words = f"{key}=12 8 devices --set {key}=16"
    assert reject("--methods", method, "--set", f"{key}=12", words=words) == ""


def test_every_batch_belongs_to_a_method_that_checks_it():
    # SSD's closed form processes rows in chunks of its own.
    assert {method for method, _ in _list_method_batches()} == set(METHODS) - {"ssd"}
    checked = {key for _, key in _list_method_batches()}
    unchecked = set(_find_batch_keys(Config(), "")) - checked
    assert unchecked == {"run.evaluate_batch"}, "it is rounded up by itself"


def test_workdir_of_another_configuration_is_rejected(reject, workdir):
    other = to_json(load_config("own.py", ["train.epochs=7"]))
    (workdir / "config.json").write_text(json.dumps(add_checksum(other)))
    reject(words="/out train.epochs --workdir")
    reject("--unlearn", "class:cat", words="unlearn.rule train.epochs")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"own"', "\x00\x01", "{}"])
def test_workdir_with_a_damaged_config_is_rejected(reject, workdir, text):
    (workdir / "config.json").write_text(text)
    reject(words="/out/config.json: damaged; remove it --workdir")


def test_data_folder_of_the_user_in_the_workdir_is_not_removed(rows, reject, workdir):
    """Raw data often lie in a folder of this name."""
    own = workdir / "data" / "precious.txt"
    own.parent.mkdir()
    own.write_text("precious")
    reject(words="out/data not created by this program --workdir")
    assert own.read_text() == "precious"
