"""Sample editions are written once, completely, and with the same bytes for a seed."""

import dataclasses
import hashlib
import subprocess
import sys

import pytest

from ccu_jax.config.schema import Data
from ccu_jax.data import DATASETS, load
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError
from tests.data.readers.layouts import ignore_progress

COMMAND = [sys.executable, "-m", "ccu_jax.data.samples"]


def hash_files(root):
    return {
        str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", editions.WRITERS)
def test_same_seed_gives_same_bytes_in_every_process(name, tmp_path):
    rows = editions.WRITERS[name].min_rows
    with pytest.raises(UserError, match="too few"):
        editions.write_if_missing(name, tmp_path / "w", rows - 1, 0, ignore_progress)
    arguments = [name, tmp_path / "a", "--rows", str(rows), "--seed", "3"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {rows} " in done.stdout
    for folder, seed in (("b", 3), ("c", 4)):
        editions.write_if_missing(name, tmp_path / folder, rows, seed, ignore_progress)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")
    assert hash_files(tmp_path / "a") != hash_files(tmp_path / "c")


def test_wrong_command_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for wrong in ([], [tmp_path / "w", "--seed", "-1"], [tmp_path / "file" / "w"]):
        command = [*COMMAND, "mmimdb", *wrong]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_finished_edition_and_other_files_are_not_overwritten(tmp_path):
    root = tmp_path / "mmimdb"
    (tmp_path / "mmimdb.new").mkdir()  # left by a killed run

    def write():
        stages = []
        editions.write_if_missing("mmimdb", root, 30, 0, lambda *s: stages.append(s))
        return stages

    assert write() and not write()
    assert [path.name for path in tmp_path.iterdir()] == ["mmimdb"]
    with pytest.raises(UserError, match="not empty and not a sample"):
        editions.write_if_missing("mmimdb", tmp_path, 30, 0, ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["mmimdb"]


@pytest.mark.parametrize("name", editions.WRITERS)
def test_sample_is_written_below_workdir_if_no_folder_is_named(name, tmp_path):
    rows = editions.WRITERS[name].min_rows
    dataset = name if name in DATASETS else "pairs"
    config = Data(dataset=dataset, sample=name, sample_rows=rows, image_size=8)
    data = load(config, tmp_path, ignore_progress)
    assert data.edition == "sample" and data.counts["read"] >= rows
    hashes = hash_files(tmp_path / "sample" / name)
    assert load(config, tmp_path, ignore_progress).fingerprint == data.fingerprint
    assert hash_files(tmp_path / "sample" / name) == hashes
    other = dataclasses.replace(config, sample_seed=1)
    assert load(other, tmp_path, ignore_progress).fingerprint != data.fingerprint
    assert hash_files(tmp_path / "sample" / name) != hashes
