"""Files are written as a whole, and checksums find any change."""

import contextlib
import json
import os

import numpy as np
import pytest

from ccu_jax.storage import records
from ccu_jax.storage.files import to_plain_json, try_lock, write_atomically


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_lock_names_its_owner_until_it_is_closed(tmp_path):
    with contextlib.ExitStack() as stack:
        assert try_lock(stack, tmp_path) == ""
        with contextlib.ExitStack() as second:
            assert try_lock(second, tmp_path).startswith(f"process {os.getpid()} on ")
    with contextlib.ExitStack() as stack:
        assert try_lock(stack, tmp_path) == ""


def test_arrays_and_nonfinite_numbers_become_plain_json():
    value = {1: np.float32(0.5), "x": (np.arange(2), np.nan, float("inf"), None, True)}
    assert to_plain_json(value) == {"1": 0.5, "x": [[0, 1], None, None, None, True]}


def test_a_record_is_read_back_and_every_change_is_found(tmp_path):
    record = {"score": 0.25, "views": {"image": [1, None]}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(records.add_checksum(record)))
    assert records.read_record(path) == record
    for broken in (record, {}, 3, records.add_checksum(record) | {"score": 0.5}):
        with pytest.raises(ValueError, match="checksum"):
            records.verify_checksum(broken)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        records.read_record(path)


def test_checksum_is_valid_only_for_unchanged_lines():
    text = records.add_line_checksum("row1\nrow2\n")
    assert records.has_valid_checksum(text)
    for broken in ("row1\nrow2\n", text.replace("1", "3", 1), text + "row3\n", ""):
        assert not records.has_valid_checksum(broken)
