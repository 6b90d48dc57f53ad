"""Ingesting rows in shards: resumable anywhere, and each image decoded once."""

import dataclasses
import io
import json
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import arrays, images, ingest
from ccu_jax.data.readers.base import Counts, Example, SkipExample, Source
from ccu_jax.errors import UserError
from tests.data.readers.layouts import ignore_progress

SIZE, ROWS = 8, 43
CONFIG = Data(image_size=SIZE, text_length=5, vocabulary=100)


def encode_image(number):
    file, rng = io.BytesIO(), np.random.default_rng(number)
    pixels = rng.integers(0, 255, (9, 11, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read(number):
    """Some rows cannot be used, some lack image or text, some have a note."""
    if number % 10 == 7:
        raise SkipExample("text file missing")
    image = b"<html>" if number % 10 == 8 else encode_image(number)
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
USABLE = [number for number in range(ROWS) if number % 10 not in (7, 8)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(ingest, "SHARD_ROWS", 5)


def run(folder, source=SOURCE, progress=ignore_progress, strict=False):
    folder.mkdir(exist_ok=True)
    counts = Counts("here", strict)
    counts.add("read", ROWS)
    sizes = ingest.ingest_rows(source, folder, CONFIG, counts, progress, None)
    return sizes, counts.numbers


def test_usable_rows_are_stored_in_order_and_others_are_counted(tmp_path):
    sizes, counts = run(tmp_path / "a")
    assert sum(sizes) == len(USABLE) and max(sizes) <= 5
    assert counts == {
        "read": ROWS,
        "skipped: text file missing": 4,
        "skipped: not an image": 4,
        "noted: odd": sum(number % 2 for number in USABLE),
    }
    rows = list(ingest.iterate_rows(tmp_path / "a"))
    assert [row["id"] for row in rows] == [f"row{number}" for number in USABLE]
    stored = np.load(tmp_path / "a" / "image.npy")
    for row, number, pixels in zip(rows, USABLE, stored, strict=True):
        example = read(number)
        assert (row["text"], row["split"]) == (example.text, example.split)
        assert [SOURCE.classes[k] for k in row["labels"]] == list(example.labels)
        assert row["image"] == (example.image is not None)
        expected = images.decode(example.image, SIZE).pixels if example.image else 0
        np.testing.assert_array_equal(pixels, np.broadcast_to(expected, pixels.shape))
    lines = (tmp_path / "a" / "journal.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["key"] for entry in entries] == [*range(5, ROWS, 5), ROWS]
    assert entries[-1]["sizes"] == sizes
    assert entries[-1]["counts"] == counts


@pytest.mark.parametrize("row", range(0, ROWS, 3))
def test_killed_pass_resumes_after_its_last_shard(row, tmp_path):
    expected, reads = run(tmp_path / "expected"), mock.Mock(side_effect=read)

    def kill(stage, done, total):
        if done > row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", progress=kill)
    with (tmp_path / "killed" / "rows.jsonl").open("ab") as file:
        file.write(b'{"half a li')
    with (tmp_path / "killed" / "journal.jsonl").open("ab") as file:
        file.write((b"", b'{"key"', b"\x00\xff", b"[")[row % 4])
    assert run(tmp_path / "killed", SOURCE._replace(read=reads)) == expected
    for name in ("image.npy", "rows.jsonl"):
        stored = (tmp_path / "killed" / name).read_bytes()
        assert stored == (tmp_path / "expected" / name).read_bytes()
    keys = sorted(call.args[0] for call in reads.call_args_list)
    assert keys == list(range(row // 5 * 5, ROWS))  # each is read once


def test_shards_are_limited_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "SHARD_ROWS", 1000)
    monkeypatch.setattr(ingest, "SHARD_BYTES", 3 * len(encode_image(0)))
    sizes, _ = run(tmp_path / "a")
    assert len(sizes) >= 8 and max(sizes) <= 6


def test_strict_pass_stops_at_the_first_unusable_row(tmp_path):
    message = "here: 7: text file missing .data.strict is on"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a", strict=True)


def write_columns(folder, source, config):
    """Ingests a source; returns its columns and metadata."""
    run(folder, source)
    counts = Counts("here", strict=False)
    meta = arrays.write_columns(folder, source, config, counts, ignore_progress)
    return arrays.load_columns(folder), meta


def test_columns_hold_the_ingested_rows(tmp_path):
    columns, meta = write_columns(tmp_path / "a", SOURCE, CONFIG)
    rows = list(ingest.iterate_rows(tmp_path / "a"))
    assert meta["counts"]["used"] == len(rows) == len(columns["image"])
    for name in ("id", "group", "split"):
        assert columns[name].tolist() == [row[name] for row in rows]
    assert columns["has_text"].tolist() == [row["text"] is not None for row in rows]
    assert columns["has_image"].tolist() == [row["image"] for row in rows]
    assert columns["labels"].tolist() == [[1, 1 in row["labels"]] for row in rows]
    assert all(isinstance(columns[name], np.memmap) for name in ("image", "text"))
    assert columns["text"].max() < meta["vocabulary"]


@pytest.mark.parametrize("rule, num_groups", [("own", 12), ("image", 6), ("text", 3)])
def test_groups_are_merged_by_text_or_image(rule, num_groups, tmp_path):
    def read_repeating(number):
        text = f"Text  {number % 6}".upper() if number % 2 else f"text {number % 6}"
        image = encode_image(number % 12)
        group = f"g{number // 2}"
        return Example(str(number), group, image, text, ("a",), "train")

    source = SOURCE._replace(keys=range(24), read=read_repeating)
    config = dataclasses.replace(CONFIG, group=rule)
    columns, meta = write_columns(tmp_path / "a", source, config)
    groups = [f"g{n // 2 % num_groups}" for n in range(24)]
    assert columns["group"].tolist() == groups
    assert meta["counts"]["noted: near-duplicate image"] == 12
