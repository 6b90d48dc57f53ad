"""Finished runs of a small configuration, and what they leave in their folders."""

import json
import shutil

import numpy as np
import pytest

from ccu_jax.evaluate.predictions import load_predictions
from tests.end_to_end.launching import SMALL_CONFIG, run_command

METHODS = ("original", "retrain_visual", "ccu_plus")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The config file."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL_CONFIG)
    return path


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """The folder of a finished run, which no test changes, and its output."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run_command("--config", small, "--workdir", workdir)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished[0], tmp_path / "run")


def load_outputs(workdir, method):
    return load_predictions(workdir / "outputs" / f"{method}-0.npz")


def load_json(path):
    return json.loads(path.read_text("utf-8"))


def load_by_method(path):
    return {record["method"]: record for record in load_json(path)}


def read_events(workdir, kind):
    lines = (workdir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def read_files(workdir, *folders):
    """Reads content and time of every file below the folders."""
    return {
        path.relative_to(workdir): (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted((workdir / folder).rglob("*"))
        if path.is_file()
    }


def read_ids(workdir):
    lines = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def assert_close_logits(one, two, methods):
    """Compares predictions of two runs up to rounding."""
    for method in methods:
        expected, predicted = load_outputs(one, method), load_outputs(two, method)
        assert predicted.id.tolist() == expected.id.tolist()
        assert predicted.split.tolist() == expected.split.tolist()
        for view, logits in expected.logits.items():
            both = (predicted.logits[view], logits)
            np.testing.assert_allclose(*both, rtol=0, atol=1e-4)
