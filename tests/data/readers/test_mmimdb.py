"""MM-IMDb: the reader, its sample edition, and the way to a prepared data set."""

import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import load
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.readers import mmimdb
from ccu_jax.data.readers.base import MARKER, Counts, SkipExample
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError


def quiet(what, done, total):
    """A progress callback that says nothing."""


def nothing_to_unpack(path):
    """An `Unpack` for folders without an archive."""
    raise AssertionError(f"{path} was to be unpacked")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sample edition of 40 movies; not to be changed."""
    root = tmp_path_factory.mktemp("sample") / "mmimdb"
    editions.ensure("mmimdb", root, 40, 3, quiet)
    return root


@pytest.fixture
def copy(written, tmp_path):
    """The plain edition to be damaged, as if it were the official one."""
    shutil.copytree(written, tmp_path / "mmimdb")
    (tmp_path / "mmimdb" / MARKER).unlink()
    return tmp_path / "mmimdb"


@pytest.fixture
def tiny(tmp_path):
    """Three movies, written by hand as the official files are."""
    root = tmp_path / "tiny"
    (root / "dataset").mkdir(parents=True)
    ids = {"test": ["0000012"], "dev": ["0000031"], "train": ["4000005"]}
    (root / "split.json").write_text(json.dumps(ids))
    for part in ids.values():
        text = '{"title": "The Paper Lighthouse", "genres": ["Mystery", "Drama"], '
        text += '"long imdb title": "...", "plot": ["One letter.", "Forty letters."]}'
        (root / "dataset" / f"{part[0]}.json").write_text(text, "ascii")
        Image.new("RGB", (60, 90)).save(root / "dataset" / f"{part[0]}.jpeg")
    return root


def change(root, i, **fields):
    """Sets fields of a movie's .json file; None removes one."""
    path = root / "dataset" / f"{i}.json"
    movie = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in movie.items() if v is not None}))


def opened(root, unpack=nothing_to_unpack, **settings):
    """The source and what was counted on opening it."""
    config = Data(dataset="mmimdb", dir=str(root), **settings)
    counts = Counts(str(root), config.strict)
    place = mmimdb.READER.locate(config, root)
    assert mmimdb.READER.signature(config, place)
    return mmimdb.READER.open(config, place, counts, unpack), counts


def read(root, unpack=nothing_to_unpack, **settings):
    """All examples by id, and the counts; rows are counted as preparing does it."""
    source, counts = opened(root, unpack, **settings)
    examples = {}
    for key in source.keys:
        try:
            example = source.read(key)
        except SkipExample as reason:
            counts.skip(str(reason), source.row_name(key))
            continue
        examples[example.id] = example
        for note in example.notes:
            counts.add(note)
    return examples, counts.numbers


def files(root):
    """Every file's name below the folder and a hash of what is in it."""
    return {
        path.relative_to(root): hashlib.md5(path.read_bytes()).digest()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# --- the sample edition ---------------------------------------------------------------


def test_the_sample_edition_has_the_official_layout(written):
    assert sorted(path.name for path in written.iterdir()) == [
        MARKER,
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


def test_the_sample_is_the_one_of_the_published_results(written):
    texts = hashlib.sha256()
    for path in (written / "split.json", *sorted(written.glob("dataset/*.json"))):
        texts.update(path.read_bytes())
    # A change here changes every published number on the sample edition.
    assert texts.hexdigest()[:16] == "43b372112e4e23b9"


# --- the reader -----------------------------------------------------------------------


def test_nothing_is_counted_where_nothing_was_planted(written):
    examples, counts = read(written)
    assert len(examples) == 40 and counts == {"read": 40}


def test_each_fault_is_counted_as_what_it_is(copy):
    ids = json.loads((copy / "split.json").read_text())["train"]
    change(copy, ids[0], plot=None)
    change(copy, ids[1], plot=["", "  ::somebody"])
    change(copy, ids[2], genres=["News"])
    change(copy, ids[3], genres=["Drama", "News", "Puppetry", "Puppetry", 3])
    change(copy, ids[4], plot=["Short.", "A much longer plot.::Ann B. <a@b.cd>"])
    (copy / "dataset" / f"{ids[5]}.jpeg").unlink()
    (copy / "dataset" / f"{ids[6]}.json").unlink()
    change(copy, ids[7], plot=["\0One\0two\0three\0::Bo"])
    change(copy, ids[8], plot=["Caf\u00e9 \ud800 \ud83d\ude00"])
    for name in ("0000001.json", "0000001.jpeg", "0000002.json"):
        (copy / "dataset" / name).write_text("{}")
    examples, counts = read(copy)
    assert counts == {
        "read": 40,
        "ignored: .json file that split.json does not list": 2,
        "ignored: genre News": 1,
        "ignored: unknown genre": 1,
        "skipped: no plot": 2,
        "skipped: none of the 23 genres": 1,
        "skipped: image missing": 1,
        "skipped: text file missing": 1,
        "noted: plot ends in ::author": 2,
        "noted: NUL characters in a text": 1,
        "noted: broken characters in a text": 1,
        "noted: non-ASCII text": 1,
    }
    assert examples[ids[3]].labels == ("Drama",)
    assert examples[ids[4]].text == "A much longer plot."
    assert examples[ids[7]].text == "One two three"
    assert examples[ids[8]].text == "Caf\u00e9 \ufffd \U0001f600"
    assert len(examples) == 35 and not {*ids[:3], *ids[5:7]} & set(examples)
    assert all(e.group == i for i, e in examples.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "text file is no valid JSON"),
        (b'{"genres": ["Drama"], "plot": ', "text file is no valid JSON"),
        (b'{"plot": ' + b"[" * 99_999, "text file is no valid JSON"),
        (b'{"votes": ' + b"9" * 5000 + b"}", "text file is no valid JSON"),
        (b'{"genres": ["Drama"], "plot": ["Caf\xe9"]}', "text file is not UTF-8"),
        (b"\xff\xfe{\0}\0", "text file is not UTF-8"),
        (b"17", "text file is no JSON object"),
        (b"null", "text file is no JSON object"),
        (b'[{"genres": ["Drama"]}]', "text file is no JSON object"),
        (b'{"genres": ["Drama"]}', "no plot"),
        (b'{"genres": ["Drama"], "plot": 7}', "no plot"),
        (b'{"genres": ["Drama"], "plot": {"a": "b"}}', "no plot"),
        (b'{"genres": ["Drama"], "plot": [7, [], null]}', "no plot"),
        (b'{"genres": ["Drama"], "plot": ["\\u0000 \\u0000"]}', "no plot"),
        (b'{"plot": ["A."]}', "none of the 23 genres"),
        (b'{"plot": ["A."], "genres": {"Drama": 1}}', "none of the 23 genres"),
        (b'{"plot": ["A."], "genres": [["Drama"], 1]}', "none of the 23 genres"),
        (b'{"plot": ["A."], "genres": ["drama"]}', "none of the 23 genres"),
    ],
)
def test_a_text_file_that_cannot_be_used_costs_one_movie(tiny, content, reason):
    (tiny / "dataset" / "4000005.json").write_bytes(content)
    examples, counts = read(tiny)
    assert counts == {"read": 3, f"skipped: {reason}": 1} and len(examples) == 2


def test_a_byte_order_mark_and_single_values_are_read(tiny):
    content = b'\xef\xbb\xbf{"plot": "A lamp.", "genres": "War"}'
    (tiny / "dataset" / "4000005.json").write_bytes(content)
    examples, counts = read(tiny)
    assert examples["4000005"][3:5] == ("A lamp.", ("War",)) and counts == {"read": 3}


def test_files_that_are_no_files_of_the_folder_are_never_read(tiny, tmp_path):
    dataset, outside = tiny / "dataset", tmp_path / "private"
    shutil.move(dataset / "4000005.jpeg", outside)
    (dataset / "4000005.jpeg").symlink_to(outside)
    os.truncate(dataset / "0000012.json", 100 << 20)
    (dataset / "0000031.json").unlink()
    os.mkfifo(dataset / "0000031.json")
    examples, counts = read(tiny)
    assert not examples and counts == {
        "read": 3,
        "skipped: image outside of the folder": 1,
        "skipped: text file too large": 1,
        "skipped: text file is no plain file": 1,
    }
    # A link to another file of the folder is none of these.
    (dataset / "4000005.jpeg").unlink()
    (dataset / "4000005.jpeg").symlink_to("0000012.jpeg")
    assert set(read(tiny)[0]) == {"4000005"}


scalars = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(strategies.characters(exclude_categories=()), max_size=30)
    | strategies.sampled_from(["Drama", "News", "A plot.", "A::b", "\0", "\ud800"])
)
values = strategies.recursive(
    scalars,
    lambda inner: (
        strategies.lists(inner, max_size=4)
        | strategies.dictionaries(strategies.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=8,
)
movies = values | strategies.fixed_dictionaries({"plot": values, "genres": values})


@hypothesis.settings(database=None, derandomize=True, deadline=None, max_examples=150)
@hypothesis.given(content=movies.map(json.dumps).map(str.encode) | strategies.binary())
def test_whatever_a_text_file_holds_its_movie_is_read_or_left_out(
    content, tmp_path_factory
):
    root = tmp_path_factory.getbasetemp() / "any"
    (root / "dataset").mkdir(parents=True, exist_ok=True)
    (root / "split.json").write_text('{"train": ["0000012"], "dev": [], "test": []}')
    (root / "dataset" / "0000012.json").write_bytes(content)
    (root / "dataset" / "0000012.jpeg").write_bytes(b"")
    examples, counts = read(root)
    skipped = sum(n for name, n in counts.items() if name.startswith("skipped"))
    assert len(examples) + skipped == counts["read"] == 1
    for example in examples.values():
        assert example.text.strip() == example.text != "" and "\0" not in example.text
        assert example.text.encode() and set(example.labels) <= set(mmimdb.GENRES)


def test_rows_come_in_the_order_of_the_lists_train_first(copy):
    splits = json.loads((copy / "split.json").read_text())
    turned = {name: splits[name] for name in ("test", "train", "dev")}
    (copy / "split.json").write_text(json.dumps(turned))
    source, _ = opened(copy)
    assert [key.id for key in source.keys] == [
        i for name in ("train", "dev", "test") for i in splits[name]
    ]
    examples = [source.read(key) for key in source.keys]
    assert [example.split for example in examples] == (
        ["train"] * 24 + ["validation"] * 4 + ["test"] * 12
    )
    assert (source.classes, source.multi_label) == (mmimdb.GENRES, True)
    assert (
        source.metric == "micro_f1"
        and source.row_name(source.keys[0]) == examples[0].id
    )


def test_many_threads_read_what_one_reads(written):
    source, _ = opened(written)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(source.read, [*source.keys] * 3))
    assert at_once == [source.read(key) for key in source.keys] * 3


def test_a_changed_list_or_folder_changes_the_signature(tiny):
    config = Data(dir=str(tiny))
    place = mmimdb.locate(config, tiny)
    os.utime(tiny / "dataset", ns=(0, 0))  # clocks of file systems tick slowly
    found = {mmimdb.READER.signature(config, place)}
    (tiny / "dataset" / "4000005.jpeg").unlink()
    found.add(mmimdb.READER.signature(config, place))
    (tiny / "split.json").write_text('{"train": ["4000005"], "dev": [], "test": []}')
    found.add(mmimdb.READER.signature(config, place))
    assert len(found) == 3 and mmimdb.READER.signature(config, place) in found


def test_the_longest_plot_is_taken_or_the_first():
    plots = ["a bb", "cc dd ee::ann@x.org", "dd cc ee"]
    author = ("noted: plot ends in ::author",)
    assert mmimdb.choose_plot(plots, "longest") == ("cc dd ee", author)
    assert mmimdb.choose_plot(plots, "first") == ("a bb", ())
    assert mmimdb.choose_plot(["", "a"], "first") is None
    assert mmimdb.choose_plot([], "longest") is None
    assert mmimdb.choose_plot([], "first") is None


def test_another_plot_policy_is_refused(tiny):
    with pytest.raises(UserError, match="'best' is neither 'longest' nor 'first'"):
        read(tiny, plot_policy="best")
    assert read(tiny, plot_policy="first")[0]["0000012"].text == "One letter."


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
    refused("no MM-IMDb in .* missing split.json, dataset/", tmp_path / "empty")
    for path in list((copy / "dataset").glob("*.jpeg"))[:25]:
        path.unlink()
    refused("lacks 25 of the 40 .jpeg files")
    (copy / "split.json").rename(tmp_path / "split.json")
    refused("has no split.json")
    (tmp_path / "split.json").rename(copy / "split.json")
    (copy / "dataset").rename(tmp_path / "away")
    refused("has no dataset/")
    (copy / "dataset").symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match="is a link out of its folder"):
        read(copy)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (b"{", "no valid JSON"),
        (b"[" * 99_999, "no valid JSON"),
        (b'{"train": "\xff"}', "not UTF-8"),
        (b'["train"]', 'no list "train"'),
        (b"17", 'no list "train"'),
        (b'{"train": [], "val": [], "test": []}', 'no list "dev"'),
        (b'{"train": [], "dev": {"0000012": 1}, "test": []}', 'no list "dev"'),
        (b" " * (17 << 20), "too large"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(tiny, splits, message):
    (tiny / "split.json").write_bytes(splits)
    with pytest.raises(UserError, match=f"split.json .*{message}.*unal.edu.co"):
        read(tiny)


def test_entries_that_name_no_movie_are_counted_and_the_others_read(tiny):
    splits = {
        "train": ["4000005", 12, "../../x", "0000031\n", None, 1.5, True, "\u0661" * 7],
        "dev": ["0000031", ["0000012"], {"id": "0000012"}, "tt00012", "", "123456"],
        "test": ["0000012", "4000005", "0000012"],
        "extra": ["0000099"],
    }
    (tiny / "split.json").write_text(json.dumps(splits))
    examples, counts = read(tiny)
    assert counts == {
        "read": 17,
        "skipped: id is not 7 digits": 12,
        "skipped: id listed twice": 2,
    }
    assert [e.split for e in examples.values()] == ["train", "validation", "test"]
    with pytest.raises(UserError, match='"train" entry 2: id is not 7 digits'):
        read(tiny, strict=True)


def test_strict_reading_stops_at_the_first_bad_movie(copy):
    first = json.loads((copy / "split.json").read_text())["train"][0]
    change(copy, first, plot=None)
    with pytest.raises(UserError, match=f"{first}: no plot"):
        read(copy, strict=True)


# --- the archive ----------------------------------------------------------------------


@pytest.fixture
def packed(tiny, tmp_path):
    """A folder with nothing but the archive, and an `Unpack` for it."""
    folder = tmp_path / "packed"
    folder.mkdir()
    with tarfile.open(folder / "mmimdb.tar.gz", "w:gz") as archive:
        archive.add(tiny, "mmimdb")

    def unpack(path):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        return tmp_path / "unpacked"

    return folder, unpack


def test_the_archive_is_read_like_the_folder_it_holds(tiny, packed):
    folder, unpack = packed
    examples, counts = read(folder, unpack)
    assert examples == read(tiny)[0]
    assert counts == {"read": 3, "noted: images in mmimdb.tar.gz": 1}
    place = mmimdb.locate(Data(dir=str(folder)), folder)
    assert place == (folder, "official")
    # A half-unpacked folder beside it is not what is read, a whole one is.
    shutil.copytree(tiny, folder / "mmimdb")
    (folder / "mmimdb" / "split.json").unlink()
    assert read(folder, unpack)[0] == examples
    shutil.copy(tiny / "split.json", folder / "mmimdb")
    assert read(folder)[1] == {"read": 3}


def test_another_archive_has_another_signature(packed):
    folder, _ = packed
    config, archive = Data(dir=str(folder)), folder / "mmimdb.tar.gz"
    place = mmimdb.locate(config, folder)
    first = mmimdb.READER.signature(config, place)
    assert mmimdb.READER.signature(config, place) == first
    os.utime(archive, ns=(0, 17))
    second = mmimdb.READER.signature(config, place)
    archive.write_bytes(archive.read_bytes() + b"\0")
    os.utime(archive, ns=(0, 17))
    assert len({first, second, mmimdb.READER.signature(config, place)}) == 3


def test_an_archive_of_something_else_is_refused(packed, tmp_path):
    folder, _ = packed
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="mmimdb.tar.gz holds no mmimdb/split.json"):
        read(folder, lambda path: tmp_path / "other")


def test_an_archive_of_the_sample_edition_is_told(packed, written):
    folder, _ = packed
    _, counts = read(folder, lambda path: written)
    assert counts["noted: mmimdb.tar.gz holds a sample edition"] == 1


# --- prepared -------------------------------------------------------------------------


def config_for(root, **settings):
    """A small configuration."""
    small = {"image_size": 16, "text_length": 12, "vocabulary": 300}
    return Data(dataset="mmimdb", dir=root and str(root), **(small | settings))


def test_prepared_pictures_are_the_posters_in_the_order_of_the_lists(copy, tmp_path):
    data = load(config_for(copy), tmp_path / "w", quiet)
    splits = json.loads((copy / "split.json").read_text())
    assert data.id.tolist() == splits["train"] + splits["dev"] + splits["test"]
    assert data.edition == "official"
    for row, i in enumerate(data.id):
        poster = (copy / "dataset" / f"{i}.jpeg").read_bytes()
        assert (data.image[row] == pictures.decode(poster, 16).pixels).all()


def test_the_archive_is_prepared_like_the_folder_it_holds(tiny, packed, tmp_path):
    folder, _ = packed
    plain = load(config_for(tiny), tmp_path / "plain", quiet)
    for given in (folder, folder / "mmimdb.tar.gz"):
        data = load(config_for(given), tmp_path / given.name, quiet)
        noted = {"noted: images in mmimdb.tar.gz": 1} if given == folder else {}
        assert data.counts == plain.counts | noted
        assert (data.image == plain.image).all() and (data.text == plain.text).all()
        assert data.id.tolist() == ["4000005", "0000031", "0000012"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TensorFlow's own
def test_damaged_records_are_made_anew_and_large_ones_keep_their_order(
    copy, tmp_path, monkeypatch
):
    shuffle = pytest.importorskip("tensorflow_datasets.core.shuffle")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 20_000)  # files, not memory
    data = load(config_for(copy, records=True), tmp_path / "w", quiet)
    splits = json.loads((copy / "split.json").read_text())
    assert data.id.tolist() == splits["train"] + splits["dev"] + splits["test"]
    for record in (tmp_path / "w" / "records").rglob("*.tfrecord*"):
        record.write_bytes(record.read_bytes()[:3000])
    again = load(config_for(copy, records=True, image_size=12), tmp_path / "w", quiet)
    assert again.id.tolist() == data.id.tolist()


LOAD = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
if sys.argv[2] == "without":
    sys.modules["tensorflow"] = None
config = Data(dataset="mmimdb", sample_rows=30, image_size=16, records=True)
data = load(config, pathlib.Path(sys.argv[1]), lambda *told: None)
print(data.fingerprint, "tensorflow" in sys.modules)
"""


@pytest.mark.slow
def test_only_keeping_records_needs_tensorflow_and_says_that_it_does(tmp_path):
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


def test_a_picture_of_any_size_counts_as_one_poster():
    file = io.BytesIO()
    Image.new("RGB", (6000, 9000)).save(file, "jpeg", quality=10)
    square = pictures.decode(file.getvalue(), 12).pixels
    assert square.shape == (12, 12, 3) and square.dtype == np.uint8
