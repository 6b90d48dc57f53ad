"""MM-IMDb: the reader, its sample edition, and the way through TFDS."""

import hashlib
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config import Data
from ccu_jax.data import load, mmimdb, pipeline, sample
from ccu_jax.data.source import SPLITS, Counts
from ccu_jax.errors import UserError


def quiet(what, done, total):
    """A progress callback that says nothing."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sample edition of 40 movies; not to be changed."""
    root = tmp_path_factory.mktemp("sample") / "mmimdb"
    sample.write_mmimdb(root, 40, 3, quiet)
    return root


@pytest.fixture
def copy(written, tmp_path):
    """The same to be damaged, as if it were the official edition."""
    root = tmp_path / "mmimdb"
    (root / "dataset").mkdir(parents=True)
    for path in written.rglob("*.*"):
        if path.name != mmimdb.MARKER:
            (root / path.relative_to(written)).write_bytes(path.read_bytes())
    return root


def change(root, i, **fields):
    """Sets fields of a movie's .json file; None removes one."""
    path = root / "dataset" / f"{i}.json"
    movie = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in movie.items() if v is not None}))


def trap(root):
    """Damages eleven movies; gives what a reader must say about them."""
    ids = json.loads((root / "split.json").read_text())["train"]
    poster = [root / "dataset" / f"{i}.jpeg" for i in ids]
    change(root, ids[0], plot=None)
    change(root, ids[1], plot=["", "  ::somebody"])
    change(root, ids[2], genres=["News"])
    change(root, ids[3], genres=["Drama", "News"])
    change(root, ids[4], plot=["Short.", "A much longer plot.::Ann B. <a@b.cd>"])
    poster[5].unlink()
    (root / "dataset" / f"{ids[6]}.json").unlink()
    (root / "dataset" / f"{ids[7]}.json").write_text("{")
    poster[8].write_bytes(poster[8].read_bytes()[:-200])
    poster[9].write_text("<html>404</html>")
    poster[10].write_bytes(b"")
    Image.new("L", (600, 900)).save(poster[11], "jpeg", progressive=True)
    Image.new("CMYK", (60, 90)).save(poster[12], "jpeg")
    for name in ("0000001.json", "0000001.jpeg", "0000002.json"):
        (root / "dataset" / name).write_text("{}")
    found = {
        "read": 40,
        "ignored: .json file that split.json does not list": 2,
        "skipped: no plot": 2,
        "ignored: genre News": 2,
        "skipped: none of the 23 genres": 1,
        "skipped: poster missing": 1,
        "skipped: text file missing": 1,
        "skipped: text file is no valid JSON": 1,
    }
    damaged = {
        "skipped: picture damaged": 1,
        "skipped: not a picture": 1,
        "skipped: picture empty": 1,
    }
    return ids, found, damaged


def read(root, **settings):
    """All examples by id, and the counts."""
    config = Data(dataset="mmimdb", dir=str(root), **settings)
    counts = Counts(str(root), config.strict)
    source = mmimdb.open_mmimdb(config, mmimdb.locate(config, root, quiet), counts)
    examples = [e for split in SPLITS for e in source.examples(split)]
    return {example.id: example for example in examples}, counts.numbers


# --- the sample edition ---------------------------------------------------------------


def test_the_sample_edition_has_the_official_layout(written):
    assert sorted(path.name for path in written.iterdir()) == [
        mmimdb.MARKER,
        "dataset",
        "split.json",
    ]
    splits = json.loads((written / "split.json").read_text("ascii"))
    assert {name: len(ids) for name, ids in splits.items()} == {
        "train": 24,
        "dev": 4,
        "test": 12,
    }
    ids = [i for part in splits.values() for i in part]
    assert len(set(ids)) == 40 and ids != sorted(ids)
    assert all(re.fullmatch("[0-9]{7}", i) for i in ids)
    names = {f"{i}.{ending}" for i in ids for ending in ("json", "jpeg")}
    assert {path.name for path in (written / "dataset").iterdir()} == names


def test_the_movies_of_the_sample_look_like_official_ones(written):
    movies, longest_first, keys = [], 0, set()
    for path in (written / "dataset").glob("*.json"):
        raw = path.read_bytes()
        assert raw.isascii() and raw.startswith(b'{\n    "title"')
        movie = json.loads(raw)
        movies.append(movie)
        keys.add(tuple(movie))
        assert 1 <= len(movie["genres"]) <= 3
        assert set(movie["genres"]) <= set(mmimdb.GENRES)
        assert 1 <= len(movie["plot"]) <= 4 and all(movie["plot"])
        longest_first += movie["plot"][0] == max(movie["plot"], key=len)
        with Image.open(path.with_suffix(".jpeg")) as poster:
            assert poster.format == "JPEG" and poster.mode == "RGB"
            assert 90 <= poster.width <= 120
            assert 1.35 < poster.height / poster.width < 1.65
    assert 0 < longest_first < 40 and len(keys) > 20
    assert {"canonical name", "name"} <= set(
        next(m["director"] for m in movies if "director" in m)[0]
    )


def test_the_sample_is_the_same_to_the_byte_for_a_seed(written, tmp_path):
    def digest(root):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [
            (path.relative_to(root), hashlib.md5(path.read_bytes()).digest())
            for path in files
        ]

    command = [sys.executable, "-m", "ccu_jax.data.sample", "mmimdb"]
    command += [str(tmp_path / "a"), "--rows", "40", "--seed", "3"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stderr == "" and "wrote 40 movies" in out.stdout
    sample.write_mmimdb(tmp_path / "b", 40, 4, quiet)
    assert digest(tmp_path / "a") == digest(written) != digest(tmp_path / "b")


def test_a_finished_sample_is_reused_and_a_foreign_folder_is_left_alone(tmp_path):
    root, told = tmp_path / "mmimdb", []
    (tmp_path / "mmimdb.new").mkdir()  # what a kill left behind
    for _ in range(2):
        told.clear()
        sample.ensure_mmimdb(root, 30, 0, lambda *stage: told.append(stage))
    assert not told and {path.name for path in tmp_path.iterdir()} == {"mmimdb"}
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        sample.ensure_mmimdb(foreign, 30, 0, quiet)
    assert (foreign / "thesis.tex").exists()


# --- the reader -----------------------------------------------------------------------


def test_each_trap_is_counted_as_what_it_is(copy):
    ids, found, _ = trap(copy)
    examples, counts = read(copy)
    assert counts == found
    assert examples[ids[3]].labels == ("Drama",)
    assert examples[ids[4]].text == "A much longer plot."
    assert len(examples) == 40 - 6 and not set(ids[:3]) & set(examples)
    assert {e.group for e in examples.values()} == set(examples)


def test_the_longest_plot_is_taken_or_the_first():
    plots = ["a bb", "cc dd ee::ann@x.org", "dd cc ee"]
    assert mmimdb.choose_plot(plots, "longest") == "cc dd ee"
    assert mmimdb.choose_plot(plots, "first") == "a bb"
    assert mmimdb.choose_plot([], "longest") is None
    assert mmimdb.choose_plot([], "first") is None


def test_the_root_is_found_from_above_at_and_below(copy):
    for given in (copy.parent, copy, copy / "dataset"):
        assert len(read(given)[0]) == 40
    for name in ("labels", "images"):
        (copy / name).mkdir()
    for path in (copy / "dataset").iterdir():
        path.rename(
            copy / ("labels" if path.suffix == ".json" else "images") / path.name
        )
    assert len(read(copy)[0]) == 40


def test_a_half_unpacked_archive_is_named_with_the_official_page(copy, tmp_path):
    def refused(message, given=copy):
        with pytest.raises(UserError, match=f"{message}.*{re.escape(mmimdb.PAGE)}"):
            read(given)

    refused("no folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds split.json and dataset/", tmp_path / "empty")
    for path in list((copy / "dataset").glob("*.jpeg"))[:25]:
        path.unlink()
    refused(r"lacks 25 of the 40 posters")
    (copy / "split.json").rename(tmp_path / "split.json")
    refused("holds dataset/ but no split.json")
    (tmp_path / "split.json").rename(copy / "split.json")
    (copy / "dataset").rename(tmp_path / "away")
    refused("holds split.json but no folder dataset/")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("{", "no valid JSON"),
        ('["train"]', 'no list "train"'),
        ('{"train": [], "val": [], "test": []}', 'no list "dev"'),
        ('{"train": ["../../x"], "dev": [], "test": []}', "not an id of 7 digits"),
        ('{"train": [17], "dev": [], "test": []}', "not an id of 7 digits"),
        ('{"train": ["0000017"], "dev": ["0000017"], "test": []}', "listed twice"),
    ],
)
def test_a_bad_list_of_splits_is_refused(copy, splits, message):
    (copy / "split.json").write_text(splits)
    with pytest.raises(UserError, match=message):
        read(copy)


def test_strict_reading_stops_at_the_first_bad_movie(copy):
    ids, *_ = trap(copy)
    with pytest.raises(UserError, match=f"{ids[0]}: no plot"):
        read(copy, strict=True)


# --- through TensorFlow and TFDS ------------------------------------------------------


def config_for(root, **settings):
    """A small configuration."""
    small = {"image_size": 16, "text_length": 12, "vocabulary": 300}
    return Data(dataset="mmimdb", dir=root and str(root), **(small | settings))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TensorFlow's own
def test_damaged_posters_are_found_when_preparing(copy, tmp_path, capfd):
    pytest.importorskip("tensorflow_datasets")
    ids, found, damaged = trap(copy)
    data = load(config_for(copy), tmp_path / "w", quiet)
    assert data.counts == found | damaged | {"used": 31}
    assert data.edition == "official" and data.classes == mmimdb.GENRES
    kept = [i for i in ids if i in set(data.id)]
    assert data.id[data.split == "train"].tolist() == kept  # in the order of the file
    grey, ink = (data.image[data.id.tolist().index(ids[k])] for k in (11, 12))
    assert (grey[:, 7] == 0).all() and ink.min() > 240
    # Other sizes come from the same records, with the same counts.
    larger = load(config_for(copy, image_size=20), tmp_path / "w", quiet)
    assert larger.counts == data.counts and larger.image.shape == (31, 20, 20, 3)
    assert len(list((tmp_path / "w" / "records").iterdir())) == 1
    with pytest.raises(UserError, match="no plot .data.strict is on"):
        load(config_for(copy, strict=True), tmp_path / "w", quiet)
    out = capfd.readouterr()
    assert out.out == "" and out.err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_damaged_records_are_made_anew_and_large_ones_keep_their_order(
    copy, tmp_path, monkeypatch
):
    shuffle = pytest.importorskip("tensorflow_datasets.core.shuffle")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 20_000)  # files, not memory
    data = load(config_for(copy), tmp_path / "w", quiet)
    splits = json.loads((copy / "split.json").read_text())
    assert data.id.tolist() == splits["train"] + splits["dev"] + splits["test"]
    for record in (tmp_path / "w" / "records").rglob("*.tfrecord*"):
        record.write_bytes(record.read_bytes()[:3000])
    again = load(config_for(copy, image_size=12), tmp_path / "w", quiet)
    assert again.id.tolist() == data.id.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_tensorflow_and_pillow_make_nearly_the_same_squares(written, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    data = load(config_for(written, image_size=32), tmp_path, quiet)
    assert data.edition == "sample"
    for row, i in enumerate(data.id):
        pillow = pipeline.square((written / "dataset" / f"{i}.jpeg").read_bytes(), 32)
        error = np.abs(pillow.astype(int) - data.image[row]).mean()
        assert error < 4, i


LOAD = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
if sys.argv[2] == "without":
    sys.modules["tensorflow"] = None
config = Data(dataset="mmimdb", sample_rows=30, image_size=16)
data = load(config, pathlib.Path(sys.argv[1]), lambda *told: None)
print(data.fingerprint, "tensorflow" in sys.modules)
"""


@pytest.mark.slow
def test_prepared_data_need_no_tensorflow_and_preparing_says_that_it_does(tmp_path):
    pytest.importorskip("tensorflow_datasets")

    def run(how):
        command = [sys.executable, "-c", LOAD, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True)

    missing = run("without")
    assert "UserError" in missing.stderr
    assert "pip install tensorflow-cpu tensorflow-datasets" in missing.stderr
    first, second, third = run("with"), run("with"), run("without")
    assert first.stderr == second.stderr == third.stderr == ""
    fingerprint = first.stdout.split()[0]
    assert first.stdout == f"{fingerprint} True\n"
    assert second.stdout == f"{fingerprint} False\n"
    assert third.stdout.startswith(fingerprint)


def test_a_picture_of_any_size_counts_as_one_poster(written):
    file = io.BytesIO()
    Image.new("RGB", (6000, 9000)).save(file, "jpeg", quality=10)
    assert pipeline.picture_size(file.getvalue()) == (6000, 9000)
    assert pipeline.square(file.getvalue(), 12).shape == (12, 12, 3)
