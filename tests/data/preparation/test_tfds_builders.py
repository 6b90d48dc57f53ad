"""TFDS records: their order, and that TensorFlow is needed to write them alone."""

import json
import os
import subprocess
import sys

import pytest

from ccu_jax.config.schema import Data
from ccu_jax.data import load
from ccu_jax.data.samples import editions
from tests.data.readers.layouts import ignore_progress

LOAD = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
if sys.argv[2] == "without":
    sys.modules["tensorflow"] = None
config = Data(dataset="mmimdb", sample_rows=30, image_size=16, records=True)
data = load(config, pathlib.Path(sys.argv[1]), lambda stage, done, total: None)
print(data.fingerprint, "tensorflow" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TensorFlow's own
def test_records_that_do_not_fit_into_memory_keep_their_order(tmp_path, monkeypatch):
    shuffle = pytest.importorskip("tensorflow_datasets.core.shuffle")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 20_000)
    root = tmp_path / "mmimdb"
    editions.write_if_missing("mmimdb", root, 40, 3, ignore_progress)
    splits = json.loads((root / "split.json").read_text())
    for image_size in (16, 12):  # the second time, the records are read
        settings = {"dir": str(root), "image_size": image_size, "records": True}
        config = Data(dataset="mmimdb", **settings)
        data = load(config, tmp_path / "w", ignore_progress)
        assert data.id.tolist() == splits["train"] + splits["dev"] + splits["test"]


@pytest.mark.slow
def test_tensorflow_is_needed_to_write_records_alone(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def run(tensorflow):
        command = [sys.executable, "-c", LOAD, str(tmp_path / "w"), tensorflow]
        environment = os.environ | {"TMPDIR": str(temporary)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    missing = run("without")
    assert "UserError" in missing.stderr
    assert "pip install tensorflow-cpu tensorflow-datasets" in missing.stderr
    first, second, third = run("with"), run("with"), run("without")
    assert first.stderr == second.stderr == third.stderr == ""
    fingerprint = first.stdout.split()[0]
    assert first.stdout == f"{fingerprint} True\n"
    assert second.stdout == f"{fingerprint} False\n"
    assert third.stdout.startswith(fingerprint)
    assert not list(temporary.glob("*tfds"))
