"""The pass over the rows: in parts, resumable anywhere, each picture decoded once."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import arrays
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.readers.base import Counts, Example, SkipExample, Source
from ccu_jax.errors import UserError

SIZE, ROWS = 8, 43
CONFIG = Data(image_size=SIZE, text_length=5, vocabulary=100)


class Killed(BaseException):
    """Stands for the end of the process."""


def encoded(number):
    file, rng = io.BytesIO(), np.random.default_rng(number)
    image = rng.integers(0, 255, (9, 11, 3), np.uint8)
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def read(number):
    """Rows of which some cannot be used, some lack a part, some have a note."""
    if number % 10 == 7:
        raise SkipExample("text file missing")
    image = b"<html>" if number % 10 == 8 else encoded(number)
    return Example(
        id=f"row{number}",
        group=f"group{number // 2}",
        image=None if number % 10 == 3 else image,
        text=None if number % 10 == 4 else f"text number {number} \u00e9\x85",
        labels=("a",) if number % 3 else ("a", "b"),
        split=("train", "train", "validation", "test")[number % 4],
        notes=("noted: odd",) if number % 2 else (),
    )


SOURCE = Source(("a", "b"), True, "micro_f1", range(ROWS), read)


def quiet(what, done, total):
    """A progress callback that says nothing."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 5)


def collect(folder, source=SOURCE, records=None, progress=quiet):
    folder.mkdir(exist_ok=True)
    counts = Counts("here", strict=False)
    counts.add("read", ROWS)
    sizes = parts.collect(source, folder, CONFIG, counts, progress, records)
    return sizes, counts.numbers


def content(folder):
    return [(folder / name).read_bytes() for name in ("image.npy", "rows.jsonl")]


def test_rows_come_in_order_with_their_pictures_and_the_rest_is_counted(tmp_path):
    sizes, counts = collect(tmp_path / "a")
    usable = [n for n in range(ROWS) if n % 10 not in (7, 8)]
    assert sum(sizes) == len(usable) and max(sizes) <= 5
    assert counts == {
        "read": ROWS,
        "skipped: text file missing": 4,
        "skipped: not an image": 4,
        "noted: odd": sum(n % 2 for n in usable),
    }
    stored = list(parts.rows(tmp_path / "a"))
    assert [row["id"] for row in stored] == [f"row{n}" for n in usable]
    image = np.load(tmp_path / "a" / "image.npy")
    for row, number, square in zip(stored, usable, image, strict=True):
        example = read(number)
        assert row["text"] == example.text and row["split"] == example.split
        assert [SOURCE.classes[k] for k in row["labels"]] == list(example.labels)
        assert row["image"] == (example.image is not None)
        wanted = pictures.decode(example.image, SIZE)[0] if example.image else 0
        np.testing.assert_array_equal(square, np.broadcast_to(wanted, square.shape))


@pytest.mark.parametrize("where", range(0, ROWS, 3))
def test_a_pass_that_was_killed_anywhere_goes_on_behind_its_last_part(where, tmp_path):
    whole = collect(tmp_path / "whole")
    read_again = collections.Counter()

    def counting(number):
        read_again[number] += 1
        return read(number)

    def killing(what, done, total):
        if done > where:
            raise Killed

    with pytest.raises(Killed):
        collect(tmp_path / "cut", progress=killing)
    with (tmp_path / "cut" / "rows.jsonl").open("ab") as file:
        file.write(b'{"half a li')
    assert collect(tmp_path / "cut", SOURCE._replace(read=counting)) == whole
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    # What is done again is less than a part.
    assert min(read_again) == where // 5 * 5 and set(read_again.values()) == {1}


@pytest.mark.parametrize("garbage", [b"", b'{"key"', b"\x00\xff", b"["])
def test_a_torn_line_of_the_journal_is_left_out(garbage, tmp_path):
    whole = collect(tmp_path / "whole")

    def killing(what, done, total):
        if done > 22:
            raise Killed

    with pytest.raises(Killed):
        collect(tmp_path / "cut", progress=killing)
    with (tmp_path / "cut" / "journal.jsonl").open("ab") as file:
        file.write(garbage)
    assert collect(tmp_path / "cut") == whole
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_every_picture_is_decoded_once_also_across_a_kill(tmp_path, monkeypatch):
    decoded = collections.Counter()
    real = pictures.decode

    def counting(data, *args):
        decoded[data] += 1
        return real(data, *args)

    monkeypatch.setattr(pictures, "decode", counting)
    collect(tmp_path / "a")
    pictures_there = [n for n in range(ROWS) if n % 10 not in (3, 7, 8)]
    assert sorted(decoded) == sorted({encoded(n) for n in pictures_there} | {b"<html>"})
    assert all(decoded[encoded(n)] == 1 for n in pictures_there)
    decoded.clear()
    collect(tmp_path / "a")  # there is nothing left to do
    assert not decoded


def test_parts_are_cut_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 1000)
    monkeypatch.setattr(parts, "PART_BYTES", 3 * len(encoded(0)))
    sizes, _ = collect(tmp_path / "a")
    assert len(sizes) >= 8 and max(sizes) <= 6


def test_a_strict_pass_stops_at_the_first_row_that_cannot_be_used(tmp_path):
    counts = Counts("here", strict=True)
    with pytest.raises(
        UserError, match="here: 7: text file missing .data.strict is on"
    ):
        parts.collect(SOURCE, tmp_path, CONFIG, counts, quiet, None)


def finish(folder, **settings):
    collect(folder)
    counts = Counts("here", strict=False)
    config = Data(**{**CONFIG.__dict__, **settings})
    told = arrays.finish(folder, SOURCE, config, counts, quiet)
    return told, arrays.load(folder)


def test_the_columns_hold_what_the_rows_hold(tmp_path):
    told, found = finish(tmp_path / "a")
    stored = list(parts.rows(tmp_path / "a"))
    assert told["counts"]["used"] == len(stored) == len(found["image"])
    for name in ("id", "group", "split"):
        assert found[name].tolist() == [row[name] for row in stored]
    assert found["has_text"].tolist() == [row["text"] is not None for row in stored]
    assert found["has_image"].tolist() == [row["image"] for row in stored]
    assert found["labels"].tolist() == [[1, 1 in row["labels"]] for row in stored]
    assert all(isinstance(found[name], np.memmap) for name in ("image", "text"))
    assert found["text"].max() < told["vocabulary"]


def test_groups_are_joined_by_text_or_picture_when_that_is_asked_for(tmp_path):
    def same(number):
        return Example(
            id=str(number),
            group=f"g{number // 2}",
            image=encoded(number % 12),
            text=f"Text  {number % 6}".upper() if number % 2 else f"text {number % 6}",
            labels=("a",),
            split="train",
        )

    source = SOURCE._replace(keys=range(24), read=same)
    names = {}
    for kind in ("own", "text", "image"):
        collect(tmp_path / kind, source)
        counts = Counts("here", strict=False)
        config = Data(**{**CONFIG.__dict__, "group": kind})
        arrays.finish(tmp_path / kind, source, config, counts, quiet)
        names[kind] = arrays.load(tmp_path / kind)["group"].tolist()
        assert counts.numbers["noted: near-duplicate image"] == 12
    assert names["own"] == [f"g{n // 2}" for n in range(24)]
    assert names["image"] == [f"g{n // 2 % 6}" for n in range(24)]
    assert names["text"] == [f"g{n // 2 % 3}" for n in range(24)]


def test_the_journal_says_how_far_the_pass_is(tmp_path):
    sizes, counts = collect(tmp_path / "a")
    lines = (tmp_path / "a" / "journal.jsonl").read_text().splitlines()
    marks = [json.loads(line) for line in lines]
    assert [mark["key"] for mark in marks] == [*range(5, ROWS, 5), ROWS]
    assert marks[-1]["sizes"] == sizes and marks[-1]["counts"] == counts
