"""MM-IMDb: plots, genres, and what is wrong in its files."""

import json
import os
import re

import pytest

from ccu_jax.data.readers import mmimdb
from ccu_jax.data.readers.base import MARKER
from ccu_jax.errors import UserError
from tests.data.readers.layouts import read_rows, write_mmimdb


@pytest.fixture
def layout(tmp_path):
    return write_mmimdb(tmp_path)


def write_text(layout, id_, content):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (layout.root / "dataset" / f"{id_}.json").write_bytes(data)


DRAMA = {"genres": ["Drama"]}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "text file is no valid JSON"),
        (b'{"genres": ["Drama"], "plot": ', "text file is no valid JSON"),
        (b'{"plot": ' + b"[" * 99_999, "text file is no valid JSON"),
        (b'{"votes": ' + b"9" * 5000 + b"}", "text file is no valid JSON"),
        (b'{"genres": ["Drama"], "plot": ["Caf\xe9"]}', "text file is not UTF-8"),
        (b"\xff\xfe{\0}\0", "text file is not UTF-8"),
        (b" " * (5 << 20), "text file too large"),
        (17, "text file is no JSON object"),
        (None, "text file is no JSON object"),
        ([DRAMA], "text file is no JSON object"),
        (DRAMA, "no plot"),
        (DRAMA | {"plot": 7}, "no plot"),
        (DRAMA | {"plot": {"a": "b"}}, "no plot"),
        (DRAMA | {"plot": [7, [], None]}, "no plot"),
        (DRAMA | {"plot": ["", "  ::somebody"]}, "no plot"),
        (DRAMA | {"plot": ["\0 \0"]}, "no plot"),
        ({"plot": ["A."]}, "none of the 23 genres"),
        ({"plot": ["A."], "genres": {"Drama": 1}}, "none of the 23 genres"),
        ({"plot": ["A."], "genres": [["Drama"], 1]}, "none of the 23 genres"),
        ({"plot": ["A."], "genres": ["drama"]}, "none of the 23 genres"),
        ({"plot": ["A."], "genres": ["News"]}, "none of the 23 genres"),
    ],
)
def test_unusable_text_file_is_skipped(layout, content, reason):
    write_text(layout, "0000001", content)
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 6, f"skipped: {reason}": 1}
    assert len(examples) == 5


def test_missing_text_file_or_pipe_is_skipped(layout):
    (layout.root / "dataset" / "0000000.json").unlink()
    (layout.root / "dataset" / "0000001.json").unlink()
    os.mkfifo(layout.root / "dataset" / "0000001.json")
    counts = read_rows(layout.config()).counts
    assert counts["skipped: text file missing"] == 1
    assert counts["skipped: text file is no plain file"] == 1


AUTHOR = ("noted: plot ends in ::author",)
NOT_ASCII = ("noted: non-ASCII text",)


@pytest.mark.parametrize(
    "plot, text, notes",
    [
        ("A lamp.", "A lamp.", ()),
        (["Short.", "Longer plot.::Ann B. <a@b.cd>"], "Longer plot.", AUTHOR),
        (["Caf\u00e9."], "Caf\u00e9.", NOT_ASCII),
        (["\0A\0b\0::Bo"], "A b", ("noted: NUL characters in a text", *AUTHOR)),
        (["\ud800 \ud83d\ude00"], None, ("noted: broken characters in a text",)),
    ],
)
def test_longest_plot_is_cleaned(layout, plot, text, notes):
    content = json.dumps({"plot": plot, "genres": "War"}).encode()
    write_text(layout, "0000001", b"\xef\xbb\xbf" + content)
    example = read_rows(layout.config()).examples["0000001"]
    assert example.text == (text or "\ufffd \U0001f600")
    assert example.notes == (notes if text else (*notes, *NOT_ASCII))
    assert example.labels == ("War",)


def test_plot_policy_chooses_the_plot(layout):
    plots = ["a bb", "cc dd ee::ann@x.org", "dd cc ee"]
    write_text(layout, "0000001", DRAMA | {"plot": plots})
    config = layout.config(plot_policy="first")
    assert read_rows(config).examples["0000001"].text == "a bb"


def test_other_genres_are_ignored_and_counted(layout):
    genres = ["War", "News", "Puppetry", "Puppetry", 3, "Drama"]
    write_text(layout, "0000001", {"plot": ["A."], "genres": genres})
    _, examples, counts = read_rows(layout.config())
    assert examples["0000001"].labels == ("Drama", "War")
    assert counts == {
        "read": 6,
        "ignored: genre News": 1,
        "ignored: unknown genre": 1,
    }


def test_texts_and_posters_may_be_in_separate_folders(layout):
    expected = read_rows(layout.config()).examples
    for name in ("labels", "images"):
        (layout.root / name).mkdir()
    for path in (layout.root / "dataset").iterdir():
        name = "labels" if path.suffix == ".json" else "images"
        path.rename(layout.root / name / path.name)
    assert read_rows(layout.config()).examples == expected
    inner = layout._replace(root=layout.root / "labels")
    assert read_rows(inner.config()).examples == expected


@pytest.mark.parametrize("ending", [".json", ".jpeg"])
def test_half_unpacked_release_is_an_error(layout, ending):
    for id_ in list(layout.images)[:4]:
        (layout.root / "dataset" / (id_ + ending)).unlink()
    message = f"dataset lacks 4 of the 6 {ending} files .*: unpack mmimdb.tar.gz again"
    with pytest.raises(UserError, match=message) as error:
        read_rows(layout.config())
    error.match(re.escape(mmimdb.PAGE))


def test_files_that_are_not_listed_are_ignored(layout):
    for name in ("0000077.json", "0000077.jpeg", "0000078.json"):
        (layout.root / "dataset" / name).write_text("{}")
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 6, "ignored: .json file that split.json does not list": 2}


@pytest.mark.parametrize(
    "splits, message",
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
def test_unusable_split_file_is_an_error(layout, splits, message):
    layout.list_file.write_bytes(splits)
    with pytest.raises(UserError, match=f"split.json .*{message}.*unal.edu.co"):
        read_rows(layout.config())


def test_entries_that_name_no_movie_are_skipped(layout):
    ids = list(layout.images)
    splits = {
        "train": [ids[2], 12, "../../x", f"{ids[1]}\n", None, 1.5, True, "\u0661" * 7],
        "dev": [ids[1], [ids[0]], {"id": ids[0]}, "tt00012", "", "123456"],
        "test": [ids[0], ids[2], ids[0]],
        "extra": ["0000099"],
    }
    # Rows come train first, whatever the order in the file.
    layout.list_file.write_text(json.dumps(dict(reversed(splits.items()))))
    _, examples, counts = read_rows(layout.config())
    assert counts["read"] == 17
    assert counts["skipped: id is not 7 digits"] == 12
    assert counts["skipped: id listed twice"] == 2
    assert list(examples) == [ids[2], ids[1], ids[0]]
    splits = [example.split for example in examples.values()]
    assert splits == ["train", "validation", "test"]
    with pytest.raises(UserError, match='"train" entry 2: id is not 7 digits'):
        read_rows(layout.config(strict=True))


def test_archive_of_a_sample_edition_or_of_something_else_is_noticed(layout, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "mmimdb.tar.gz").write_bytes(b"")
    config = layout._replace(root=tmp_path / "given").config()
    (layout.root / MARKER).write_text("")
    counts = read_rows(config, unpack=lambda path: layout.root).counts
    assert counts["noted: mmimdb.tar.gz holds a sample edition"] == 1
    layout.list_file.unlink()
    with pytest.raises(UserError, match="mmimdb.tar.gz holds no mmimdb/split.json"):
        read_rows(config, unpack=lambda path: layout.root)
