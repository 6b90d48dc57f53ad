"""MM-IMDb: plots, genres, and unusable files."""

import json
import re

import pytest

from ccu_jax.data.readers import mmimdb
from ccu_jax.data.readers.base import MARKER
from ccu_jax.errors import UserError
from tests.data.readers.layouts import read_rows, write_mmimdb


@pytest.fixture
def layout(tmp_path):
    return write_mmimdb(tmp_path)


@pytest.fixture
def write_text(layout):
    """Writes the text file of movie 0000001."""

    def run(content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (layout.root / "dataset" / "0000001.json").write_bytes(data)

    return run


NO_JSON, NO_OBJECT = "text file is no valid JSON", "text file is no JSON object"
NO_PLOT, NO_GENRE = "no plot", "none of the 23 genres"
BAD_PLOTS = [..., 7, {"a": "b"}, [7, [], None], ["", "  ::somebody"], ["\0 \0"]]
BAD_GENRES = [..., {"Drama": 1}, [["Drama"], 1], ["drama"], ["News"]]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", NO_JSON),
        (b'{"genres": ["Drama"], "plot": ', NO_JSON),
        (b'{"plot": ' + b"[" * 99_999, NO_JSON),
        (b'{"votes": ' + b"9" * 5000 + b"}", NO_JSON),
        (b'{"genres": ["Drama"], "plot": ["Caf\xe9"]}', "text file is not UTF-8"),
        (b"\xff\xfe{\0}\0", "text file is not UTF-8"),
        (b" " * (5 << 20), "text file too large"),
        *((content, NO_OBJECT) for content in (17, None, [{"genres": ["Drama"]}])),
        *(({"genres": ["Drama"], "plot": plot}, NO_PLOT) for plot in BAD_PLOTS),
        *(({"plot": ["A."], "genres": genres}, NO_GENRE) for genres in BAD_GENRES),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_unusable_text_file_is_skipped(layout, write_text, content, reason):
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if value is not ...}
    write_text(content)
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 6, f"skipped: {reason}": 1}
    assert len(examples) == 5


AUTHOR, NOT_ASCII = "noted: plot ends in ::author", "noted: non-ASCII text"
NUL, BROKEN = "noted: NUL characters in a text", "noted: broken characters in a text"


@pytest.mark.parametrize(
    "policy, plot, text, notes",
    [
        ("longest", "A lamp.", "A lamp.", []),
        ("longest", ["Short.", "Longer.::Ann B. <a@b.cd>"], "Longer.", [AUTHOR]),
        ("longest", ["a bb", "c dd ee::ann@x.org", "dd c ee"], "c dd ee", [AUTHOR]),
        ("first", ["a bb", "cc dd ee::ann@x.org", "dd cc ee"], "a bb", []),
        ("longest", ["Caf\u00e9."], "Caf\u00e9.", [NOT_ASCII]),
        ("longest", ["\0A\0b\0::Bo"], "A b", [NUL, AUTHOR]),
        ("first", ["\ud800 \ud83d"], "\ufffd \ufffd", [BROKEN, NOT_ASCII]),
    ],
)
def test_plot_is_chosen_and_cleaned(layout, write_text, policy, plot, text, notes):
    content = json.dumps({"plot": plot, "genres": "War"}).encode()
    write_text(b"\xef\xbb\xbf" + content)
    example = read_rows(layout.config(plot_policy=policy)).examples["0000001"]
    assert (example.text, list(example.notes)) == (text, notes)
    assert example.labels == ("War",)


def test_first_plot_without_text_is_no_plot(layout, write_text):
    write_text({"genres": ["Drama"], "plot": ["", "a"]})
    counts = read_rows(layout.config(plot_policy="first")).counts
    assert counts == {"read": 6, "skipped: no plot": 1}


def test_other_genres_are_ignored_and_counted(layout, write_text):
    genres = ["War", "News", "Puppetry", "Puppetry", 3, "Drama"]
    write_text({"plot": ["A."], "genres": genres})
    _, examples, counts = read_rows(layout.config())
    assert examples["0000001"].labels == ("Drama", "War")
    expected = {"read": 6, "ignored: genre News": 1, "ignored: unknown genre": 1}
    assert counts == expected


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
def test_unlisted_files_are_ignored_and_many_missing_ones_an_error(layout, ending):
    for name in ("0000077.json", "0000077.jpeg", "0000078.json"):
        (layout.root / "dataset" / name).write_text("{}")
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 6, "ignored: .json file that split.json does not list": 2}
    for id_ in list(layout.images)[:4]:
        (layout.root / "dataset" / (id_ + ending)).unlink()
    message = f"dataset lacks 4 of the 6 {ending} files .*: unpack mmimdb.tar.gz again"
    with pytest.raises(UserError, match=f"{message}.*{re.escape(mmimdb.PAGE)}"):
        read_rows(layout.config())


@pytest.mark.parametrize(
    "splits, message",
    [
        (b"{", "no valid JSON"),
        (b"[" * 99_999, "no valid JSON"),
        (b'{"train": "\xff"}', "not UTF-8"),
        (b'["train"]', 'no list "train"'),
        (b"17", 'no list "train"'),
        (b'{"train": [], "dev": {"0000012": 1}, "test": []}', 'no list "dev"'),
        (b" " * (17 << 20), "too large"),
    ],
    ids=lambda value: ascii(value)[:40],
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
    rows = [(example.id, example.split) for example in examples.values()]
    assert rows == [(ids[2], "train"), (ids[1], "validation"), (ids[0], "test")]
    with pytest.raises(UserError, match='"train" entry 2: id is not 7 digits'):
        read_rows(layout.config(strict=True))


def test_archive_of_a_sample_edition_or_of_other_files_is_noticed(layout, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mmimdb.tar.gz").write_bytes(b"")
    config = layout._replace(root=tmp_path / "packed").config()
    (layout.root / MARKER).write_text("")
    counts = read_rows(config, unpack=lambda path: layout.root).counts
    assert counts["noted: mmimdb.tar.gz holds a sample edition"] == 1
    layout.list_file.unlink()
    with pytest.raises(UserError, match="mmimdb.tar.gz lacks mmimdb/split.json"):
        read_rows(config, unpack=lambda path: layout.root)
