"""The lock of a working folder."""

import subprocess
import sys

import pytest

from ccu_jax import workdirs
from ccu_jax.errors import UserError

OTHER = (
    "import pathlib, sys\n"
    "from ccu_jax import workdirs\n"
    "with workdirs.locked(pathlib.Path(sys.argv[1])):\n"
    "    print('mine', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_a_folder_that_is_not_there_yet_can_be_locked_and_again_later(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with workdirs.locked(folder):
            assert (folder / "run.lock").read_text().startswith("process ")


def test_a_folder_that_another_process_has_is_refused_until_it_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .*another --w"):
            with workdirs.locked(tmp_path):
                pass
    finally:
        other.kill()  # a lock goes with who had it, however that ends
        other.communicate()
    with workdirs.locked(tmp_path):
        pass


def test_a_text_that_was_damaged_is_written_anew_and_others_are_left_alone(tmp_path):
    whole, damaged = tmp_path / "sets" / "whole", tmp_path / "sets" / "damaged"
    texts = {whole: "one\n", damaged: "two\n"}
    workdirs.keep(texts)
    before = whole.stat().st_mtime_ns
    damaged.write_bytes(b"t\xffo\n")
    workdirs.keep(texts)
    assert {path: path.read_text() for path in texts} == texts
    assert whole.stat().st_mtime_ns == before
