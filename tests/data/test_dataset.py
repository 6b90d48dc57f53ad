"""Loading a data set: preparation, reuse, damage, archives and TFDS records."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Data
from ccu_jax.data import load, load_prepared
from ccu_jax.data.preparation import ingest, tfds_builders
from ccu_jax.data.readers.base import Example
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    dump_lines,
    encode_image,
    ignore_progress,
    make_pairs,
    write_files,
)
from tests.editions import write_with_defects


def prepare(config, workdir):
    return load(config, workdir, ignore_progress)


def load_without_preparing(config, workdir):
    """Loads prepared data; fails if any stage of the preparation is reported."""
    stages = []
    data = load(config, workdir, lambda *stage: stages.append(stage))
    assert not stages
    return data


@pytest.fixture
def source(tmp_path):
    return tmp_path / "pairs"


@pytest.fixture
def write(source):
    """Writes rows and their images to `source`; returns the configuration."""

    def write_rows(rows, image=None):
        images = {row["image"]: image or encode_image() for row in rows}
        write_files(source, {"pairs.jsonl": dump_lines(rows)} | images)
        return Data(dir=str(source), image_size=8, text_length=6, vocabulary=100)

    return write_rows


@pytest.fixture
def config(write):
    """The configuration of a source with 30 rows."""
    return write(make_pairs(30))


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "w"


class Killed(BaseException):
    """Stands for the end of the process."""


def prepare_until_killed(config, workdir, row):
    def kill(stage, done, total):
        if stage == "reading and decoding" and done > row:
            raise Killed

    with pytest.raises(Killed):
        load(config, workdir, kill)


def test_second_load_maps_the_same_rows(config, source):
    workdir = source / "run"  # it may lie inside the source
    first = prepare(config, workdir)
    (workdir / "results.json").write_text("[]")
    second = load_without_preparing(config, workdir)
    assert isinstance(second.image, np.memmap)
    assert not second.image.flags.writeable
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_rows_are_listed_in_a_table(config, workdir):
    data = prepare(config, workdir)
    with (workdir / "data" / "rows.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["id"] for row in rows] == data.id.tolist()
    assert [row["split"] for row in rows] == data.split.tolist()
    assert [row["image"] == "yes" for row in rows] == data.has_image.tolist()
    for row, label in zip(rows, data.labels, strict=True):
        names = [name for name, x in zip(data.classes, label, strict=True) if x]
        assert row["labels"] == "|".join(names)


def test_other_settings_or_changed_files_are_prepared_again(
    write, config, source, workdir
):
    first = prepare(config, workdir)
    larger = dataclasses.replace(config, image_size=16)
    assert prepare(larger, workdir).image.shape == (30, 16, 16, 3)
    (source / "images" / "new").write_bytes(encode_image("blue"))
    (source / "images" / "new").rename(source / "images" / "0.png")
    assert prepare(config, workdir).fingerprint != first.fingerprint
    assert len(prepare(write(make_pairs(31)), workdir).id) == 31
    with pytest.raises(UserError, match=r"have changed since .*w was created"):
        load(write(make_pairs(30)), workdir, ignore_progress, "stored fingerprint")
    assert len(prepare(write(make_pairs(31)), workdir).id) == 31


def test_other_processes_map_what_process_0_has_prepared(config, source, workdir):
    with pytest.raises(UserError, match="lacks the data that process 0"):
        load_prepared(config, workdir)
    first = prepare(config, workdir)
    # The source may look different from another host.
    (source / "images" / "new.png").write_bytes(encode_image())
    second = load_prepared(config, workdir)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.image, first.image)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dataset": "coco"}, "data.dataset: unknown data set 'coco'; choose one of f"),
        (
            {"test_fraction": 0.6, "validation_fraction": 0.4},
            "data.test_fraction=0.6 and data.validation_fraction=0.4: no rows are left",
        ),
        ({"dir": "nowhere"}, "nowhere"),
        ({"dir": __file__}, "test_dataset.py is not a folder, zip or tar archive"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(settings, message, workdir):
    with pytest.raises(UserError, match=message) as error:
        prepare(Data(**settings), workdir)
    assert "\n" not in str(error.value)


def test_source_without_a_usable_row_is_reported_with_the_counts(write, workdir):
    with pytest.raises(UserError, match="no usable row left"):
        prepare(write([]), workdir)
    with pytest.raises(UserError, match=r"no usable row left .*4 skipped: not an imag"):
        prepare(write(make_pairs(4), image=b"<html>"), workdir)
    assert not (workdir / "data").exists()


LOAD_CLIPART = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
report = lambda *stage: print("preparing", flush=True)
data = load(Data(), pathlib.Path(sys.argv[1]), report)
print(data.fingerprint, "tensorflow" in sys.modules)
"""


def test_killed_preparation_leaves_no_partial_data(workdir):
    command = [sys.executable, "-c", LOAD_CLIPART, str(workdir)]
    for delay_s in (0.0, 0.15, 0.4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
    data = prepare(Data(), workdir)
    assert len(data.id) == 1408
    assert data.edition == "clipart"
    # Another process, with another hash seed, maps it without TensorFlow.
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{data.fingerprint} False\n", "")


def test_kill_between_two_renames_loses_nothing(config, workdir):
    first = prepare(config, workdir)
    (workdir / "data").rename(workdir / "data.old")
    (workdir / "data.new").mkdir()
    assert prepare(config, workdir).fingerprint == first.fingerprint
    assert {path.name for path in workdir.iterdir()} == {"data", "data.lock"}
    # A kill after the renames leaves what is to be removed.
    for name in ("data.old", "unpacked"):
        (workdir / name).mkdir()
        (workdir / name / "file").write_text("x")
    (workdir / "data" / "rows.jsonl").write_text("x")
    assert prepare(config, workdir).fingerprint == first.fingerprint
    assert {path.name for path in workdir.iterdir()} == {"data", "data.lock"}
    assert not (workdir / "data" / "rows.jsonl").exists()


@pytest.mark.parametrize("name", ["image.npy", "rows.jsonl", "journal.jsonl"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_killed_pass_with_damaged_files_starts_anew(
    config, workdir, tmp_path, monkeypatch, name, damage
):
    monkeypatch.setattr(ingest, "SHARD_ROWS", 4)
    prepare_until_killed(config, workdir, 22)
    path = workdir / "data.new" / name
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    data, expected = prepare(config, workdir), prepare(config, tmp_path / "x")
    assert data.fingerprint == expected.fingerprint
    assert data.counts == expected.counts


def test_changed_bytes_and_metadata_are_noticed_and_repaired(config, workdir):
    first = prepare(config, workdir)
    names = ("image.npy", "text.npy", "labels.npy", "id.npy", "tokenizer.json")
    for path in [workdir / "data" / name for name in names]:
        intact = path.read_bytes()
        path.write_bytes(intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:])
        prepare(config, workdir)
        assert path.read_bytes() == intact
    path = workdir / "data" / "meta.json"
    intact = path.read_text()
    for change in ({"vocabulary": 7}, {"counts": first.counts | {"read": 9}}):
        path.write_text(json.dumps(json.loads(intact) | change))
        data = prepare(config, workdir)
        assert (data.vocabulary, data.counts) == (first.vocabulary, first.counts)
        assert path.read_text() == intact


def test_prepared_data_outlive_their_source(config, source, workdir):
    first = prepare(config, workdir)
    source.rename(source.with_name("elsewhere"))
    assert prepare(config, workdir).fingerprint == first.fingerprint
    os.truncate(workdir / "data" / "image.npy", 500)
    with pytest.raises(UserError, match="no folder"):
        prepare(config, workdir)


NAMES = ("mmimdb", "fashion200k", "hatefulmemes", "medical")


def config_for(name, root, **settings):
    config = load_config(name).data
    changes: dict[str, Any] = {"image_size": 8, "records": False} | settings
    return dataclasses.replace(config, dir=str(root), **changes)


@pytest.mark.parametrize("name", NAMES)
def test_archive_gives_the_same_data_as_its_folder(name, tmp_path, workdir):
    kind = "zip" if name in ("mmimdb", "medical") else "gztar"
    root = tmp_path / "files" / name
    editions.write_if_missing(name, root, 200, 1, ignore_progress)
    expected = prepare(config_for(name, root), tmp_path / "expected")
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "files")
    config = config_for(name, archive)
    data = prepare(config, workdir)
    assert data.fingerprint == expected.fingerprint
    assert data.edition == expected.edition == "sample"
    assert not (workdir / "unpacked").exists()
    again = load_without_preparing(config, workdir)
    assert again.fingerprint == data.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_records_hold_the_source_and_serve_other_image_sizes(name, tmp_path, workdir):
    editions.write_if_missing(name, tmp_path / name, 200, 2, ignore_progress)

    def config(image_size, records):
        root = tmp_path / name
        return config_for(name, root, image_size=image_size, records=records)

    first = prepare(config(48, records=True), workdir)
    (folder,) = (workdir / "records").iterdir()
    builder = tfds_builders.load_builder(folder)
    for split in ("train", "validation", "test"):
        rows = np.flatnonzero(first.split == split)
        stored = list(builder.as_dataset(split=split).as_numpy_iterator())
        assert [row["id"].decode() for row in stored] == first.id[rows].tolist()
        assert all(row["image"].ndim == 3 for row in stored)
    for image_size in (8, 12):
        data = prepare(config(image_size, records=True), workdir)
        expected = prepare(config(image_size, records=False), tmp_path / "x")
        assert data.fingerprint == expected.fingerprint
        assert data.counts == first.counts
        # The second time, damaged records are written again from the source.
        for path in folder.rglob("*.tfrecord-*"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)


@pytest.mark.slow
def test_images_written_as_records_are_not_kept_in_memory(tmp_path):
    store = tfds_builders.RecordStore(tmp_path, "pairs", ("x", "y"))
    image = encode_image() + bytes(1000)
    before = sys.getrefcount(image)
    for shard in range(3):
        store.write_shard(shard, [Example("a", "a", image, "text", ("x",), "train")])
    assert sys.getrefcount(image) == before


@pytest.mark.slow
def test_records_that_vanish_during_a_pass_are_written_again(
    tmp_path, workdir, monkeypatch
):
    root = tmp_path / "mmimdb"
    write_with_defects("mmimdb", root, 100, 0)
    monkeypatch.setattr(ingest, "SHARD_ROWS", 20)
    first = prepare(config_for("mmimdb", root, image_size=48, records=True), workdir)
    (folder,) = (workdir / "records").iterdir()
    config = config_for("mmimdb", root, records=True)
    expected = prepare(config_for("mmimdb", root), tmp_path / "x").fingerprint
    for damage in (
        lambda: shutil.rmtree(workdir / "records"),
        lambda: next(folder.rglob("dataset_info.json")).unlink(),
        lambda: (folder / "complete.json").write_text("{}"),
    ):
        prepare_until_killed(config, workdir, 45)
        damage()
        data = prepare(config, workdir)
        assert data.fingerprint == expected
        assert data.counts == first.counts
        assert len(set(data.id.tolist())) == len(data.id)
        assert tfds_builders.read_manifest(folder) is not None
        shutil.rmtree(workdir / "data")
