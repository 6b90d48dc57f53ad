"""Methods and whole runs use stored features instead of a pass over the images."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ccu_jax import models
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.forward import Forward
from ccu_jax.evaluate.predictions import load_predictions, predict_all_splits
from ccu_jax.experiments import run
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL
from ccu_jax.train.step import init_state
from tests import toy
from tests.evaluate.conftest import contents, read, record_calls, write

CCU = pytest.mark.parametrize("name", ["ccu", "ccu_plus"])


@pytest.fixture
def stored(problem, folder, columns):
    """The problem with its store, and without passes over images."""
    identity = feature_store.store_identity(problem.params, "toy")
    write(folder, columns, identity)

    class NoImages(Forward):
        def _encode_batch(self, *args):
            raise AssertionError("a pass over images")

    forward = NoImages(problem.model, problem.executor, 32)
    return problem._replace(store=read(folder, identity), forward=forward)


def arrays_of(program):
    opt = init_state(program, jax.random.key(0)).opt
    state = program.params, opt, program.frozen, program.sharded_tables, program.aux
    return jax.tree.leaves(state)


@CCU
def test_method_starts_from_stored_features_without_images(problem, stored, name):
    fast = METHODS[name](stored._replace(method=name))
    slow = METHODS[name](problem._replace(method=name))
    np.testing.assert_equal(fast.plan, slow.plan)
    for x, y in zip(arrays_of(fast), arrays_of(slow), strict=True):
        # Equal shapes and types: both share their executables.
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    computed = toy.make_config(run={"features": "computed"})
    with pytest.raises(AssertionError, match="a pass over images"):
        METHODS[name](stored._replace(method=name, config=computed))


def test_predictions_from_stored_features_are_those_from_images(problem, stored):
    table = stored.store.as_table(problem.table)
    assert not {"image", "text"} & set(table)
    params, dataset = problem.params, toy.make_dataset()

    def predict(problem, params, table):
        return predict_all_splits(problem.forward, params, table, dataset, problem.sets)

    expected = predict(problem, params, problem.table)._asdict()
    predicted = predict(stored, params, table)
    for name, value in predicted._asdict().items():
        for x, y in zip(*map(jax.tree.leaves, (value, expected[name])), strict=True):
            if np.asarray(x).dtype.kind == "f":
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(x, y, err_msg=name)
    # Other parameters of the image tail leave the text logits bit-identical.
    tail = {name: jax.tree.map(lambda x: x + 0.1, params[name]) for name in TAIL}
    logits = predict(stored, params | tail, table).logits
    assert logits["text"].tobytes() == predicted.logits["text"].tobytes()
    assert logits["image"].tobytes() != predicted.logits["image"].tobytes()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The configuration of a run on a folder of small images."""
    data = toy.write_pairs(tmp_path_factory.mktemp("own") / "pairs")
    tiny = toy.make_config(train={"epochs": 1}, ccu_plus={"steps": 4, "shrink": 1.0})
    return dataclasses.replace(tiny, data=data, methods=("original", "ccu_plus"))


def watch_encoders(monkeypatch):
    """Returns a list that grows when a trunk or text tower is traced."""
    traced, build = [], models.build

    def watched(*args, **kwargs):
        return record_calls(build(*args, **kwargs), ("trunk", "encode_text"), traced)

    monkeypatch.setattr(models, "build", watched)
    return traced


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    workdir.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        traced = watch_encoders(monkeypatch)
        run.run(settings, workdir)
    assert "trunk" in traced
    return workdir


def load(workdir, method="ccu_plus"):
    return load_predictions(workdir / "outputs" / f"{method}-0.npz")


@pytest.mark.slow
@pytest.mark.parametrize("features", ["stored", "stale", "computed"])
def test_run_uses_stored_features_unless_they_are_stale_or_not_wanted(
    settings, finished, tmp_path, monkeypatch, features
):
    workdir = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "stages" / "ccu_plus-0.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "ccu_plus-0")
    folder = workdir / "checkpoints" / "original-0" / "features"
    before = contents(folder)
    if features == "stale":
        description = json.loads((folder / "about.json").read_text())
        description["checkpoint"] = "0" * 64
        (folder / "about.json").write_text(json.dumps(description))
        (folder / "features.bin").write_bytes(bytes(len(before["features.bin"])))
    elif features == "computed":
        computed = dataclasses.replace(settings.run, features="computed")
        settings = dataclasses.replace(settings, run=computed)
    traced = watch_encoders(monkeypatch)
    run.run(settings, workdir)
    assert bool(traced) == (features != "stored")
    assert contents(folder) == before
    result = json.loads((workdir / "stages" / "ccu_plus-0.json").read_text())
    assert result["features"] == settings.run.features
    assert result["text_unchanged"] is True
    original, unlearned = load(workdir, "original"), load(workdir)
    expected = load(finished)
    assert expected.id.tolist() == unlearned.id.tolist()
    for view, logits in unlearned.logits.items():
        atol = 1e-3 if features == "computed" else 0
        np.testing.assert_allclose(logits, expected.logits[view], rtol=0, atol=atol)
        is_same = logits.tobytes() == original.logits[view].tobytes()
        assert is_same == (view == "text"), view
