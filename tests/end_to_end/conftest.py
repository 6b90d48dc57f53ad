"""Finished runs of a small configuration, and what they leave in their folders."""

import json
import shutil

import pytest

from ccu_jax.inference import load_classifier
from tests import toy
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


def load_json(path):
    return json.loads(path.read_text("utf-8"))


def events(workdir, kind):
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


def listed_ids(workdir):
    lines = (workdir / "unlearn_sets" / "0.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def load_params(workdir, method):
    return load_classifier(workdir, method).params


def stored_features(workdir):
    folder = workdir / "checkpoints" / "original-0" / "features"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_bits(one, other, methods=METHODS):
    """Compares predictions, parameters and stored features of two runs."""
    for method in methods:
        name = f"outputs/{method}-0.npz"
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
        assert toy.trees_equal(load_params(one, method), load_params(other, method))
    assert stored_features(one) == stored_features(other) != {}
