"""Methods and whole runs use stored features instead of a pass over the images."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from ccu_jax import data, models
from ccu_jax.config.schema import Data
from ccu_jax.distributed import executors
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.forward import Forward
from ccu_jax.evaluate.predictions import load_predictions, predict_all_splits
from ccu_jax.experiments import run
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL, VIEWS
from ccu_jax.train.loop import Loop
from ccu_jax.train.step import init_state
from tests import toy
from tests.evaluate.stores import EVERY, contents, read, write

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
    for one, other in zip(arrays_of(fast), arrays_of(slow), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    computed = toy.make_config(run={"features": "computed"})
    with pytest.raises(AssertionError, match="a pass over images"):
        METHODS[name](stored._replace(method=name, config=computed))


def test_method_does_not_start_if_features_were_removed(folder, stored):
    feature_store.remove_rows(folder, stored.sets.unlearn[:1])
    store = read(folder, feature_store.store_identity(stored.params, "toy"))
    with pytest.raises(ValueError, match="removed"):
        METHODS["ccu_plus"](stored._replace(store=store, method="ccu_plus"))


def test_predictions_from_stored_features_are_those_from_images(problem, stored):
    table = stored.store.as_table(problem.table)
    assert not {"image", "text"} & set(table)
    params, dataset = problem.params, toy.make_dataset()

    def predict(problem, params, table):
        return predict_all_splits(problem.forward, params, table, dataset, problem.sets)

    expected = predict(problem, params, problem.table)._asdict()
    predicted = predict(stored, params, table)
    for name, value in predicted._asdict().items():
        values, others = jax.tree.leaves(value), jax.tree.leaves(expected[name])
        for x, y in zip(values, others, strict=True):
            if np.asarray(x).dtype.kind == "f":
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(x, y, err_msg=name)
    # Other parameters of the image tail leave the text logits bit-identical.
    tail = {name: jax.tree.map(lambda x: x + 0.1, params[name]) for name in TAIL}
    logits = predict(stored, params | tail, table).logits
    assert logits["text"].tobytes() == predicted.logits["text"].tobytes()
    assert logits["image"].tobytes() != predicted.logits["image"].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@CCU
def test_stored_and_computed_features_share_a_program_and_its_results(
    tmp_path, name, dtype
):
    settings = toy.make_config(
        model={"dtype": dtype}, **{name: {"steps": 5}}, run={"steps_per_call": 2}
    )
    problem = toy.make_problem(executors.vmap(2), settings=settings)
    compute = feature_store.make_compute_fn(
        problem.forward, problem.params, problem.table, 0
    )
    write(tmp_path / "features", compute(EVERY))
    loop = Loop(settings.run, problem.executor, pytest.fail)

    def unlearn(kind, store):
        with_store = problem._replace(store=store)
        stage, folder = toy.NullStage(), tmp_path / kind
        outcome = loop.run(name, METHODS[name], with_store, folder, stage)
        assert outcome.diverged is None and set(outcome.params) == set(TAIL)
        params = problem.params | outcome.params
        return problem.forward.outputs(params, problem.table, EVERY)

    stored = unlearn("stored", read(tmp_path / "features"))
    computed = unlearn("computed", None)
    # The initial state, and the steps by their shapes and by their text.
    assert len(loop._compiled) == 3
    before = problem.forward.outputs(problem.params, problem.table, EVERY)
    for view in VIEWS:
        # Five steps of Adam amplify rounding.
        np.testing.assert_allclose(stored[view], computed[view], atol=1e-3)
    for outputs in (stored, computed):
        assert outputs["text"].tobytes() == before["text"].tobytes()
        assert outputs["fused"].tobytes() != before["fused"].tobytes()


# --- whole runs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a run on a folder of small images."""
    folder = tmp_path_factory.mktemp("own") / "pairs"
    toy.write_pairs(folder)
    tiny = toy.make_config(
        train={"epochs": 1}, ccu_plus={"steps": 4, "shrink": 1.0}, ccu={"steps": 4}
    )
    own = Data(dir=str(folder), image_size=8, text_length=6, vocabulary=120)
    return dataclasses.replace(tiny, data=own, methods=("original", "ccu_plus"))


def watch_trunk(monkeypatch):
    """Returns a list that grows when a trunk or text tower is traced."""
    traced, build = [], models.build

    def watched(*args, **kwargs):
        model = build(*args, **kwargs)

        def trace(name):
            def call(*args):
                traced.append(name)
                return getattr(model, name)(*args)

            return call

        return model._replace(trunk=trace("trunk"), encode_text=trace("encode_text"))

    monkeypatch.setattr(models, "build", watched)
    return traced


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    workdir.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        traced = watch_trunk(monkeypatch)
        run.run(settings, workdir)
    assert "trunk" in traced
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the folder in which ccu_plus has not run."""
    workdir = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "stages" / "ccu_plus-0.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "ccu_plus-0")
    return workdir


def load(workdir, method="ccu_plus"):
    return load_predictions(workdir / "outputs" / f"{method}-0.npz")


def assert_same_predictions(one, other, atol=0.0):
    one, other = load(one), load(other)
    assert one.id.tolist() == other.id.tolist()
    for view, logits in one.logits.items():
        np.testing.assert_allclose(logits, other.logits[view], rtol=0, atol=atol)


def result(workdir):
    return json.loads((workdir / "stages" / "ccu_plus-0.json").read_text())


@pytest.mark.slow
def test_run_on_a_finished_original_makes_no_pass_over_images(
    settings, finished, workdir, monkeypatch
):
    before = contents(finished / "checkpoints" / "original-0" / "features")
    traced = watch_trunk(monkeypatch)
    run.run(settings, workdir)
    assert not traced
    assert contents(workdir / "checkpoints" / "original-0" / "features") == before
    assert_same_predictions(finished, workdir)
    assert result(workdir)["features"] == "stored"
    assert result(workdir)["text_unchanged"] is True
    original, unlearned = load(workdir, "original").logits, load(workdir).logits
    assert original["text"].tobytes() == unlearned["text"].tobytes()
    assert original["image"].tobytes() != unlearned["image"].tobytes()


@pytest.mark.slow
def test_stale_store_is_rebuilt(settings, finished, workdir, monkeypatch):
    folder = workdir / "checkpoints" / "original-0" / "features"
    before, description = contents(folder), folder / "about.json"
    stale = json.loads(description.read_text()) | {"checkpoint": "0" * 64}
    description.write_text(json.dumps(stale))
    (folder / "features.bin").write_bytes(bytes(len(before["features.bin"])))
    traced = watch_trunk(monkeypatch)
    run.run(settings, workdir)
    assert "trunk" in traced
    assert contents(folder) == before
    assert_same_predictions(finished, workdir)


@pytest.mark.slow
def test_run_that_computes_features_has_the_same_results_up_to_rounding(
    settings, finished, workdir, monkeypatch
):
    computed = dataclasses.replace(settings.run, features="computed")
    traced = watch_trunk(monkeypatch)
    run.run(dataclasses.replace(settings, run=computed), workdir)
    assert "trunk" in traced
    assert result(workdir)["features"] == "computed"
    assert result(workdir)["text_unchanged"] is True
    assert_same_predictions(finished, workdir, atol=1e-3)


@pytest.mark.slow
def test_original_is_evaluated_on_its_stored_features(settings, finished):
    store = read(finished / "checkpoints" / "original-0" / "features", {})
    predicted = load(finished, "original")
    ids = data.load_prepared(settings.data, finished).id.tolist()
    rows = np.array([ids.index(name) for name in predicted.id.tolist()])
    stored = store.take(rows)
    assert len(store.valid) == 80
    for view, logits in predicted.logits.items():
        np.testing.assert_allclose(logits, stored[f"original_{view}"], atol=1e-6)
