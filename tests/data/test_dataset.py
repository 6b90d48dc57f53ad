"""The prepared form, from the first start to the last, and the tokeniser."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Data
from ccu_jax.data import load, load_prepared
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.preparation import tfds_builders as records
from ccu_jax.data.readers.base import Example
from ccu_jax.data.samples import editions
from ccu_jax.data.tokenizer import (
    END,
    PAD,
    UNKNOWN,
    encode,
    load_tokenizer,
    train_tokenizer,
)
from ccu_jax.errors import UserError
from tests.editions import write_with_defects


def quiet(what, done, total):
    """A progress callback that says nothing."""


def picture(colour="red", size=(12, 8), mode="RGB", kind="PNG"):
    """An encoded picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A function that writes pairs.jsonl (and a picture for each row that has one)."""
    root = tmp_path / "pairs"
    (root / "images").mkdir(parents=True)

    def write(rows, pictures=None):
        for n, row in enumerate(rows):
            if isinstance(row, dict) and str(row.get("image")).startswith("images/"):
                data = (pictures or {}).get(n, picture())
                if data is not None:
                    (root / row["image"]).write_bytes(data)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        (root / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
        return Data(dir=str(root), image_size=8, text_length=6, vocabulary=100)

    return write


def rows(number, **more):
    """Valid rows of two classes, alternating."""
    return [
        {"image": f"images/{n}.png", "text": f"a thing {n}", "label": "xy"[n % 2]}
        | more
        for n in range(number)
    ]


# --- the prepared form ----------------------------------------------------------------


def test_the_second_load_maps_the_same_rows(folder, tmp_path):
    config, told = folder(rows(8)), []
    first = load(config, tmp_path / "w", lambda *stage: told.append(stage))
    assert told and {len(stage) for stage in told} == {3}
    told.clear()
    second = load(config, tmp_path / "w", lambda *stage: told.append(stage))
    assert not told and first.fingerprint == second.fingerprint
    assert isinstance(second.image, np.memmap) and not second.image.flags.writeable
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_the_rows_are_listed_for_people(folder, tmp_path):
    loaded = load(folder(rows(8)), tmp_path / "run", quiet)
    with (tmp_path / "run" / "data" / "rows.tsv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file, delimiter="\t"))
    assert [row["id"] for row in listed] == loaded.id.tolist()
    assert [row["split"] for row in listed] == loaded.split.tolist()
    assert [row["image"] == "yes" for row in listed] == loaded.has_image.tolist()
    for row, label in zip(listed, loaded.labels, strict=True):
        named = [n for n, x in zip(loaded.classes, label, strict=True) if x]
        assert row["labels"] == "|".join(named)


def test_other_settings_or_changed_files_are_prepared_anew(folder, tmp_path):
    config = folder(rows(8))
    first = load(config, tmp_path / "w", quiet)
    (tmp_path / "pairs" / "images" / "new").write_bytes(picture("blue"))
    larger = Data(**{**config.__dict__, "image_size": 16})
    assert load(larger, tmp_path / "w", quiet).image.shape == (8, 16, 16, 3)
    (tmp_path / "pairs" / "images" / "new").rename(
        tmp_path / "pairs" / "images" / "0.png"
    )
    assert load(config, tmp_path / "w", quiet).fingerprint != first.fingerprint
    folder(rows(9))
    second = load(config, tmp_path / "w", quiet)
    assert len(second.id) == 9 and second.fingerprint != first.fingerprint


def test_prepared_data_outlive_their_source_but_not_their_damage(folder, tmp_path):
    config = folder(rows(8))
    first = load(config, tmp_path / "w", quiet)
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    assert load(config, tmp_path / "w", quiet).fingerprint == first.fingerprint
    (tmp_path / "elsewhere").rename(tmp_path / "pairs")
    os.truncate(tmp_path / "w" / "data" / "image.npy", 500)
    again = load(config, tmp_path / "w", quiet)
    assert again.fingerprint == first.fingerprint and again.image[-1].any()


def test_the_workdir_may_lie_below_the_data(folder, tmp_path):
    config, told = folder(rows(8)), []
    inside = tmp_path / "pairs" / "run"
    load(config, inside, quiet)
    (inside / "results.json").write_text("[]")
    load(config, inside, lambda *stage: told.append(stage))
    assert not told


def test_what_is_said_of_prepared_data_is_not_believed_when_it_was_damaged(
    folder, tmp_path
):
    config = folder(rows(8))
    first = load(config, tmp_path / "w", quiet)
    meta = tmp_path / "w" / "data" / "meta.json"
    text = meta.read_text()
    for name, value in (("vocabulary", 7), ("counts", first.counts | {"read": 9})):
        meta.write_text(json.dumps(json.loads(text) | {name: value}))
        again = load(config, tmp_path / "w", quiet)
        assert (again.vocabulary, again.counts) == (first.vocabulary, first.counts)
        assert meta.read_text() == text


def test_leftovers_of_a_killed_run_do_no_harm(folder, tmp_path):
    config = folder(rows(8))
    for name in ("data.new", "data.old"):
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / "meta.json").write_text("{}")
    assert len(load(config, tmp_path / "w", quiet).id) == 8
    left = {path.name for path in (tmp_path / "w").iterdir()}
    assert left == {"data", "data.lock"}


def test_wrong_names_and_sizes_are_told_plainly(folder, tmp_path):
    names = "fashion200k, hatefulmemes, mmimdb, pairs"
    for config, message in (
        (Data(dataset="coco"), f"data.dataset: 'coco' is none of {names}"),
        (Data(group="picture"), "data.group: 'picture' is none of own, text, image"),
        (Data(sample="dogs"), "data.sample: 'dogs'"),
        (Data(image_size=0), "data.image_size: 0 is below 4"),
        (
            Data(test_fraction=0.6, validation_fraction=0.4),
            "data.test_fraction 0.6 and data.validation_fraction 0.4",
        ),
        (Data(dataset="mmimdb", sample_rows=5), "data.sample_rows: 5 movies are too f"),
        (Data(dataset="mmimdb", plot_policy="all"), "data.plot_policy: 'all'"),
        (Data(dataset="fashion200k", task="brand"), "data.task: 'brand'"),
        (Data(dir=str(tmp_path / "nowhere")), "nowhere"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(config, tmp_path / "w", quiet)
        assert "\n" not in str(error.value)


def test_data_without_a_usable_row_are_refused_with_the_counts(folder, tmp_path):
    with pytest.raises(UserError, match="no usable row left"):
        load(folder([]), tmp_path / "w", quiet)
    bad = dict.fromkeys(range(4), b"<html>")
    with pytest.raises(UserError, match="no usable row left .*4 skipped: not an image"):
        load(folder(rows(4), bad), tmp_path / "w", quiet)
    assert not (tmp_path / "w" / "data").exists()


LOAD = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
tell = lambda *told: print("at work", flush=True)
data = load(Data(), pathlib.Path(sys.argv[1]), tell)
print(data.fingerprint, "tensorflow" in sys.modules)
"""


def test_a_kill_at_any_time_leaves_all_or_nothing(tmp_path):
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    for delay_s in (0.0, 0.15, 0.4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
    kept = load(Data(), tmp_path, quiet)
    assert len(kept.id) == 1408 and kept.edition == "clipart"
    # Another process, its own hash seed: the same bytes, without heavy imports.
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == (f"{kept.fingerprint} False\n", "")
    fresh = [*command[:-1], str(tmp_path / "fresh")]
    out = subprocess.run(fresh, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == f"{kept.fingerprint} False"
    assert out.stderr == ""


# --- every data set -------------------------------------------------------------------

SETS = ("mmimdb", "fashion200k", "hatefulmemes", "medical")


def settings(name, root):
    """The data set's own configuration, for files in `root`, with small pictures."""
    config = load_config(name, []).data
    return dataclasses.replace(config, dir=str(root), image_size=48, records=False)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
@pytest.mark.parametrize("name", SETS)
def test_an_archive_is_read_like_the_folder_that_it_holds(name, kind, tmp_path):
    root = tmp_path / "files" / name
    editions.ensure(name, root, 200, 1, quiet)
    config = dataclasses.replace(settings(name, root), image_size=8)
    plain = load(config, tmp_path / "plain", quiet)
    packed = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "files")
    config = dataclasses.replace(config, dir=packed)
    found = load(config, tmp_path / "w", quiet)
    assert found.fingerprint == plain.fingerprint
    assert found.edition == plain.edition == "sample"
    assert not (tmp_path / "w" / "unpacked").exists(), "nothing is left of it"
    told = []
    again = load(config, tmp_path / "w", lambda *stage: told.append(stage))
    assert again.fingerprint == found.fingerprint and not told


def test_what_is_neither_folder_nor_archive_is_refused(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"Rar!" + bytes(2000))
    with pytest.raises(UserError, match="x.rar is neither a folder nor a zip or tar"):
        load(Data(dir=str(tmp_path / "x.rar")), tmp_path / "w", quiet)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_records_hold_what_the_source_holds_and_serve_other_sizes(name, tmp_path):
    root = tmp_path / name
    editions.ensure(name, root, 200, 2, quiet)
    config = dataclasses.replace(settings(name, root), records=True)
    first = load(config, tmp_path / "w", quiet)
    (folder,) = (tmp_path / "w" / "records").iterdir()
    builder = records.builder(folder)
    for split in ("train", "validation", "test"):
        rows = np.flatnonzero(first.split == split)
        stored = list(builder.as_dataset(split=split).as_numpy_iterator())
        assert [row["id"].decode() for row in stored] == first.id[rows].tolist()
        assert all(row["image"].ndim == 3 for row in stored)
    smaller = dataclasses.replace(config, image_size=8)
    read = []
    found = load(smaller, tmp_path / "w", lambda *stage: read.append(stage))
    plain = dataclasses.replace(smaller, records=False)
    assert found.fingerprint == load(plain, tmp_path / "x", quiet).fingerprint
    assert found.counts == first.counts
    # Damage is noticed, and mended from the source.
    for path in folder.rglob("*.tfrecord-*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = load(dataclasses.replace(config, image_size=12), tmp_path / "w", quiet)
    plain = dataclasses.replace(plain, image_size=12)
    assert again.fingerprint == load(plain, tmp_path / "x", quiet).fingerprint
    assert again.counts == first.counts


@pytest.mark.slow
def test_pictures_that_were_stored_as_records_are_not_kept_in_memory(tmp_path):
    keeper = records.Records(tmp_path, "pairs", ("x", "y"), tmp_path)
    image = picture() + bytes(1000)
    before = sys.getrefcount(image)
    for part in range(3):
        keeper.write(part, [Example("a", "a", image, "text", ("x",), "train")])
    assert sys.getrefcount(image) == before


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_records_that_vanish_during_a_pass_over_them_are_made_anew(
    tmp_path, monkeypatch
):
    root = tmp_path / "mmimdb"
    write_with_defects("mmimdb", root, 60, 0)
    monkeypatch.setattr(parts, "PART_ROWS", 20)
    config = dataclasses.replace(settings("mmimdb", root), records=True)
    first = load(config, tmp_path / "w", quiet)
    (folder,) = (tmp_path / "w" / "records").iterdir()
    smaller = dataclasses.replace(config, image_size=8)
    expected = load(
        dataclasses.replace(smaller, records=False), tmp_path / "x", quiet
    ).fingerprint

    def killing(what, done, total):
        if what == "reading and decoding" and done > 45:
            raise Killed

    for damage in (
        lambda: shutil.rmtree(tmp_path / "w" / "records"),
        lambda: next(folder.rglob("dataset_info.json")).unlink(),
        lambda: (folder / "complete.json").write_text("{}"),
    ):
        with pytest.raises(Killed):
            load(smaller, tmp_path / "w", killing)
        damage()
        found = load(smaller, tmp_path / "w", quiet)
        assert found.fingerprint == expected and found.counts == first.counts
        assert len(set(found.id.tolist())) == len(found.id)
        assert records.complete(folder) is not None
        shutil.rmtree(tmp_path / "w" / "data")


def test_a_kill_between_any_two_moves_loses_nothing(folder, tmp_path):
    config, workdir = folder(rows(8)), tmp_path / "w"
    first = load(config, workdir, quiet)
    # Between the two renames: what was there is aside, the new one is not yet there.
    (workdir / "data").rename(workdir / "data.old")
    (workdir / "data.new").mkdir()
    assert load(config, workdir, quiet).fingerprint == first.fingerprint
    assert {path.name for path in workdir.iterdir()} == {"data", "data.lock"}
    # After them: nothing was tidied up.
    for name in ("data.old", "unpacked"):
        (workdir / name).mkdir()
        (workdir / name / "file").write_text("x")
    (workdir / "data" / "rows.jsonl").write_text("x")
    assert load(config, workdir, quiet).fingerprint == first.fingerprint
    assert {path.name for path in workdir.iterdir()} == {"data", "data.lock"}
    assert not (workdir / "data" / "rows.jsonl").exists()


@pytest.mark.parametrize("name", ["image", "text", "labels", "id", "tokenizer"])
def test_prepared_data_with_one_bit_changed_are_prepared_again(folder, tmp_path, name):
    config, workdir = folder(rows(30)), tmp_path / "w"
    load(config, workdir, quiet)
    path = workdir / "data" / f"{name}.{'json' if name == 'tokenizer' else 'npy'}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    load(config, workdir, quiet)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["image.npy", "rows.jsonl", "journal.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_pass_whose_files_were_damaged_begins_anew(
    folder, tmp_path, monkeypatch, name, damage
):
    config, workdir = folder(rows(30)), tmp_path / "w"
    monkeypatch.setattr(parts, "PART_ROWS", 4)

    def killing(what, done, total):
        if what == "reading and decoding" and done > 22:
            raise Killed

    with pytest.raises(Killed):
        load(config, workdir, killing)
    path = workdir / "data.new" / name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    found = load(config, workdir, quiet)
    undisturbed = load(config, tmp_path / "x", quiet)
    assert found.fingerprint == undisturbed.fingerprint
    assert found.counts == undisturbed.counts


def test_other_processes_map_what_the_first_has_prepared(folder, tmp_path):
    config = folder(rows(8))
    with pytest.raises(UserError, match="does not hold what process 0 has prepared"):
        load_prepared(config, tmp_path / "w")
    first = load(config, tmp_path / "w", quiet)
    # On their own disk the source may look otherwise.
    (tmp_path / "pairs" / "images" / "new.png").write_bytes(picture())
    other = load_prepared(config, tmp_path / "w")
    assert other.fingerprint == first.fingerprint
    assert (other.image == first.image).all()


# --- the tokeniser --------------------------------------------------------------------


def test_the_tokeniser_depends_on_the_texts_and_not_on_their_order(tmp_path):
    texts = [f"The {a} sees a {b}" for a in ("lion", "lynx") for b in ("ship", "sheep")]
    one, two = train_tokenizer(texts, 120), train_tokenizer(texts[::-1], 120)
    assert one.to_str() == two.to_str() and one.get_vocab_size() <= 120
    one.save(str(tmp_path / "t.json"))
    again = encode(load_tokenizer(tmp_path / "t.json"), texts, 9)
    np.testing.assert_array_equal(again, encode(one, texts, 9))


def test_every_text_ends_with_the_end_token_and_is_cut_to_fit():
    tokenizer = train_tokenizer(["one two three four"] * 3, 200)
    tokens = encode(tokenizer, ["one two three four", "ONE", None, "\u4e16"], 4)
    assert tokens.shape == (4, 4) and tokens.dtype == np.int32
    assert tokens[0, 3] == END and (tokens[0] > 0).all()
    assert tokens[1, 1:].tolist() == [END, 0, 0]
    assert tokens[2].tolist() == [END, 0, 0, 0]
    assert tokens[3].tolist()[1:] == [UNKNOWN, END, 0]


def test_a_text_cannot_smuggle_in_special_tokens():
    tokenizer = train_tokenizer(["pad end [ ] words"] * 3, 200)
    tokens = encode(tokenizer, ["[PAD] [END] [UNK] words"], 30)[0]
    length = int((tokens != PAD).sum())
    assert (tokens[: length - 1] > END).sum() >= 8
    assert tokens[length - 1] == END and (tokens[:length] != PAD).all()
