"""The store of an original's features: whole or not there, its own or not used."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ccu_jax import data
from ccu_jax.config.schema import Data
from ccu_jax.distributed import executors as parallel
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
from ccu_jax.experiments import run
from ccu_jax.methods import METHODS
from ccu_jax.models import TAIL, VIEWS
from ccu_jax.runs import purge
from ccu_jax.train import checkpoint
from ccu_jax.train.loop import Loop
from ccu_jax.train.step import init_state
from tests import toy

NAMES = {"features", "h_text", "z_text", "fresh", *(f"original_{v}" for v in VIEWS)}
ROWS = 56
FACTS = {"checkpoint": "that one", "fingerprint": "these data"}


def quiet(done, count):
    """A progress callback that says nothing."""


@pytest.fixture(scope="module")
def problem():
    return toy.make_problem(parallel.vmap(2))


@pytest.fixture(scope="module")
def computed(problem):
    """`columns` of `features.write`: one pass over the pictures of some rows."""
    fresh = features.init_untrained(problem.model, problem.seed)

    def columns(rows):
        return features.compute_features(
            problem.forward, problem.params, fresh, problem.table, rows
        )

    return columns


@pytest.fixture(scope="module")
def every(computed):
    """The columns of all rows."""
    return computed(np.arange(ROWS))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Four between the device and the disk, the last of them not full."""
    monkeypatch.setattr(features, "CHUNK_ROWS", 16)


@pytest.fixture
def folder(tmp_path, every):
    """A store of all rows."""
    place = tmp_path / "original-0" / "features"
    store_at(place, every)
    return place


def store_at(place, every, facts=FACTS):
    count = len(next(iter(every.values())))

    def columns(rows):
        return {name: x[rows] for name, x in every.items()}

    features.write(place, facts, count, columns, quiet)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is stored -------------------------------------------------------------------


def test_what_is_stored_is_what_is_computed(tmp_path, problem, computed, every):
    told = []
    features.write(
        tmp_path / "features", FACTS, ROWS, computed, lambda *x: told.append(x)
    )
    store = features.read(tmp_path / "features", FACTS)
    assert set(store.columns) == NAMES == set(every)
    assert store.valid.all() and len(store.valid) == ROWS
    rows = np.array([5, 0, 55, 5, 17, 33])
    taken = store.take(rows)
    for name, x in every.items():
        stored = store.columns[name]
        assert (stored.shape, stored.dtype) == (x.shape, x.dtype)
        # Batches of other rows: another order of the sums at most.
        np.testing.assert_allclose(stored, x, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(taken[name], np.asarray(stored)[rows])
    assert [int(done) for done, _ in told] == [16, 32, 48, 56]
    assert {count for _, count in told} == {ROWS}
    # Two tokens for each picture, and what the original and a fresh trunk make of it.
    assert every["features"].shape == (ROWS, 2, 8)
    out = problem.forward.outputs(problem.params, problem.table, rows)
    for name in ("h_text", "z_text"):
        np.testing.assert_allclose(taken[name], out[name], atol=1e-6)
    for view in VIEWS:
        np.testing.assert_allclose(taken[f"original_{view}"], out[view], atol=1e-6)
    fresh = features.init_untrained(problem.model, problem.seed)
    trunk = problem.model.trunk(fresh, np.asarray(problem.table["image"])[rows])
    np.testing.assert_allclose(taken["fresh"], features.pool_tokens(trunk), atol=1e-5)


def test_columns_are_mapped_into_memory_and_cannot_be_written(folder):
    store = features.read(folder, FACTS)
    for x in store.columns.values():
        assert isinstance(x, np.memmap) and x.mode == "r"
        with pytest.raises(ValueError):
            x[0] = 0
    taken = store.take(np.arange(3))
    assert not any(isinstance(x, np.memmap) for x in taken.values())
    for x in taken.values():
        x[:] = 0  # one's own
    assert features.count_remaining(folder, np.arange(ROWS)) == ROWS


def test_features_in_bfloat16_come_back_to_the_bit(tmp_path):
    settings = toy.make_config(model={"dtype": "bfloat16"})
    problem = toy.make_problem(parallel.vmap(1), settings=settings)
    fresh = features.init_untrained(problem.model, 0)
    of = problem.forward, problem.params, fresh, problem.table
    every = features.compute_features(*of, np.arange(ROWS))
    assert every["features"].dtype == jnp.bfloat16
    store_at(tmp_path / "features", every)
    store = features.read(tmp_path / "features", FACTS)
    for name, x in store.columns.items():
        assert x.dtype == every[name].dtype
        assert x.tobytes() == every[name].tobytes(), name
    removed = features.remove_rows(tmp_path / "features", [3, 4])
    assert removed == 2 and features.count_remaining(tmp_path / "features", [3, 4]) == 0


@pytest.mark.parametrize("kind", [np.float32, jnp.bfloat16])
def test_pooled_features_are_the_same_on_host_and_device(kind):
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(kind)
    expected = np.concatenate([x[:, 0], x[:, 1:].astype(np.float32).mean(1)], axis=1)
    for found in (features.pool_tokens(x), features.pool_tokens(jnp.asarray(x))):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert isinstance(features.pool_tokens(jnp.asarray(x)), jax.Array)
    assert isinstance(features.pool_tokens(x), np.ndarray)


# --- whose it is ----------------------------------------------------------------------


def test_a_store_belongs_to_one_checkpoint_and_one_data_set(problem, folder, every):
    facts = features.store_identity(problem.params, "toy0")
    store_at(folder, every, facts)
    assert features.read(folder, features.store_identity(problem.params, "toy0"))
    assert (
        features.read(folder, features.store_identity(problem.params, "toy1")) is None
    )
    host = jax.device_get(problem.params)
    assert features.read(folder, features.store_identity(host, "toy0"))
    for part in host:
        leaves, tree = jax.tree.flatten(host[part])
        nearly = [np.nextafter(leaves[0], np.float32(9)), *leaves[1:]]
        other = {**host, part: jax.tree.unflatten(tree, nearly)}
        assert features.read(folder, features.store_identity(other, "toy0")) is None, (
            part
        )


def test_the_digest_of_parameters_goes_by_names_kinds_and_shapes():
    x = np.arange(6, dtype=np.float32)
    trees = (
        {"a": x, "b": x + 1},
        {"a": x + 1, "b": x},
        {"a": x, "c": x + 1},
        {"a": x.reshape(2, 3), "b": x + 1},
        {"a": x.astype(np.float64), "b": x + 1},
        {"a": x},
    )
    assert len({checkpoint.digest(tree) for tree in trees}) == len(trees)
    again = {"b": jnp.asarray(x + 1), "a": jnp.asarray(x)}
    assert checkpoint.digest(again) == checkpoint.digest(trees[0])


def test_there_is_none_where_nothing_was_stored(tmp_path):
    assert features.read(tmp_path / "features", FACTS) is None
    (tmp_path / "features").mkdir()
    assert features.read(tmp_path / "features", FACTS) is None
    (tmp_path / "file").write_text("precious")
    assert features.read(tmp_path / "file", FACTS) is None


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_store_with_one_bit_changed_does_not_count(folder, name):
    path = folder / f"{name}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:])
    assert features.read(folder, FACTS) is None
    path.write_bytes(whole)
    assert features.read(folder, FACTS) is not None


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "gone"])
def test_a_store_with_a_file_of_another_size_does_not_count(folder, change):
    for path in sorted(folder.glob("*.bin")):
        whole = path.read_bytes()
        if change == "gone":
            path.unlink()
        else:
            cut = {"shorter": whole[:-1], "longer": whole + b"\0", "empty": b""}
            path.write_bytes(cut[change])
        assert features.read(folder, FACTS) is None, path.name
        path.write_bytes(whole)
        assert features.read(folder, FACTS) is not None


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "\x00\x01",
        "{}",
        '{"checkpoint": "that one", "fingerprint": "these data"}',
        *(
            json.dumps({**FACTS, "columns": columns})
            for columns in (
                None,
                [],
                {},
                {"features": None},
                {"features": {}},
                {"features": {"shape": None, "dtype": "float32"}},
                {"features": {"shape": [56, 2, 8], "dtype": "float33"}},
                {"features": {"shape": [56, 2, 9], "dtype": "float32"}},
                {"features": {"shape": [], "dtype": "float32"}},
                {"features": {"shape": ["56", 2, 8], "dtype": "float32"}},
                {"features": {"shape": [112, 8], "dtype": "float32"}},
                {"nothing": {"shape": [56, 2, 8], "dtype": "float32"}},
            )
        ),
    ],
)
def test_a_store_with_a_damaged_description_does_not_count(folder, damage):
    (folder / "about.json").write_text(damage)
    assert features.read(folder, FACTS) is None


# --- a kill at any moment -------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["first", "replacing"])
@pytest.mark.parametrize("fails_at", [0, 16, 48])
def test_what_fails_on_the_way_leaves_an_earlier_store_as_it_was(
    tmp_path, every, before, fails_at
):
    place = tmp_path / "features"
    if before:
        store_at(place, every)
        earlier = contents(place)

    def columns(rows):
        if rows[0] >= fails_at:
            raise RuntimeError("the machine is on fire")
        return {name: x[rows] for name, x in every.items()}

    others = {**FACTS, "checkpoint": "another"}
    with pytest.raises(RuntimeError, match="on fire"):
        features.write(place, others, ROWS, columns, quiet)
    assert features.read(place, others) is None
    assert (features.read(place, FACTS) is not None) == before
    if before:
        assert contents(place) == earlier
    # What lies about does not harm the next attempt.
    store_at(place, every, others)
    assert features.read(place, others) and features.read(place, FACTS) is None
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


CHILD = """
import os, pathlib, shutil, signal, sys
import numpy as np
from ccu_jax.evaluate import feature_store as features

folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
features.CHUNK_ROWS = 16

def kill(name):
    if moment == name:
        os.kill(os.getpid(), signal.SIGKILL)

def columns(rows):
    kill(f"rows {rows[0]}")
    x = np.arange(56 * 6, dtype=np.float32).reshape(56, 6)[rows] + 1000
    return {"features": x.reshape(-1, 2, 3), "fresh": 2 * x}

remove, rename = shutil.rmtree, pathlib.Path.rename

def rmtree(path, **kwargs):
    if pathlib.Path(path) == folder:
        kill("before the old one goes")
        names = sorted(os.listdir(path)) if moment == "while the old one goes" else []
        for name in names[:2]:
            os.unlink(os.path.join(path, name))
        kill("while the old one goes")
    remove(path, **kwargs)

def moved(self, target):
    kill("before the new one comes")
    rename(self, target)
    kill("after the new one came")

shutil.rmtree, pathlib.Path.rename = rmtree, moved
features.write(folder, {"checkpoint": "new"}, 56, columns, lambda *told: None)
print("whole")
"""
MOMENTS = {
    "rows 0": "old",
    "rows 32": "old",
    "before the old one goes": "old",
    "while the old one goes": None,
    "before the new one comes": None,
    "after the new one came": "new",
    "never": "new",
}


@pytest.mark.slow
def test_a_kill_leaves_the_old_store_or_the_new_one_or_none(tmp_path):
    old = {"features": np.ones((56, 2, 3), np.float32), "fresh": np.ones((56, 6))}
    x = np.arange(56 * 6, dtype=np.float32).reshape(56, 6) + 1000
    new = {"features": x.reshape(-1, 2, 3), "fresh": 2 * x}
    children = {}
    for moment in MOMENTS:
        folder = tmp_path / moment.replace(" ", "-") / "features"
        store_at(folder, old, {"checkpoint": "old"})
        children[moment] = (
            folder,
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(folder), moment],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
                },
            ),
        )
    for moment, (folder, child) in children.items():
        out, err = child.communicate(timeout=200)
        killed = -signal.SIGKILL if moment != "never" else 0
        assert child.returncode == killed, (moment, err)
        found = {
            facts: features.read(folder, {"checkpoint": facts})
            for facts in ("old", "new")
        }
        there = {facts for facts, store in found.items() if store}
        assert there == ({MOMENTS[moment]} - {None}), moment
        for facts in there:
            for name, x in {"old": old, "new": new}[facts].items():
                np.testing.assert_array_equal(found[facts].columns[name], x)
        # Whatever was left, the next one is whole again.
        store_at(folder, new, {"checkpoint": "third"})
        assert features.read(folder, {"checkpoint": "third"})
        assert len(list(folder.parent.iterdir())) == 1


# --- rows that are removed ------------------------------------------------------------

GONE = np.array([3, 17, 18, 55])


def test_a_full_disk_ends_writing_as_an_error_that_can_be_told(
    folder, every, monkeypatch
):
    before = contents(folder)
    opened = pathlib.Path.open

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path, *given, **named):
        return Full() if path.suffix == ".bin" else opened(path, *given, **named)

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        store_at(folder, every)
    monkeypatch.undo()
    assert contents(folder) == before


def test_a_store_that_a_cut_off_purge_has_thinned_is_made_again(tmp_path, problem):
    place = tmp_path / "features"
    features.open_or_build(
        place,
        problem.forward,
        problem.params,
        problem.table,
        problem.seed,
        "data",
        quiet,
    )
    features.remove_rows(place, np.array([3, 4]))
    thinned = features.read(place, features.store_identity(problem.params, "data"))
    with pytest.raises(ValueError, match="removed"):
        thinned.as_table(problem.table)
    again = features.open_or_build(
        place,
        problem.forward,
        problem.params,
        problem.table,
        problem.seed,
        "data",
        quiet,
    )
    assert again.valid.all()
    assert features.count_remaining(place, np.array([3, 4])) == 2


def test_a_store_whose_columns_name_other_files_is_none(folder, every):
    other = folder.parent / "precious.bin"
    other.write_bytes((folder / f"{next(iter(every))}.bin").read_bytes())
    before = other.read_bytes()
    about = json.loads((folder / "about.json").read_text())
    about["columns"]["../precious"] = about["columns"][next(iter(every))]
    (folder / "about.json").write_text(json.dumps(about))
    assert features.read(folder, FACTS) is None
    assert features.remove_rows(folder, GONE) == 0 and other.read_bytes() == before


def test_removed_rows_are_zero_on_the_disk_and_cannot_be_taken(folder, every):
    assert features.count_remaining(folder, GONE) == len(GONE)
    mapped = features.read(folder, FACTS)
    assert features.remove_rows(folder, GONE) == len(GONE)
    assert features.count_remaining(folder, GONE) == 0
    others = np.setdiff1d(np.arange(ROWS), GONE)
    assert features.count_remaining(folder, others) == len(others)
    for name, x in every.items():
        raw = np.frombuffer((folder / f"{name}.bin").read_bytes(), x.dtype)
        raw = raw.reshape(x.shape)
        assert not raw[GONE].view(np.uint8).any(), name
        assert raw[others].tobytes() == x[others].tobytes(), name
        # Who had mapped them before sees them no more either.
        assert not mapped.columns[name][GONE].any()
    store = features.read(folder, FACTS)
    assert np.flatnonzero(~store.valid).tolist() == GONE.tolist()
    for rows in (GONE, GONE[:1], [0, 1, 17]):
        with pytest.raises(ValueError, match="removed"):
            store.take(np.asarray(rows))
    assert len(store.take(others)["features"]) == len(others)


def test_rows_can_be_removed_again_and_more_of_them(folder):
    for rows in (GONE, GONE, [0, 3]):
        assert features.remove_rows(folder, rows) == len(rows)
    assert not features.read(folder, FACTS).valid[[0, *GONE]].any()
    assert features.read(folder, FACTS).valid.sum() == ROWS - 1 - len(GONE)
    assert features.remove_rows(folder, []) == 0


def test_nothing_is_removed_where_there_is_no_store(tmp_path):
    assert features.remove_rows(tmp_path / "features", GONE) == 0
    assert features.count_remaining(tmp_path / "features", GONE) == 0
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_of_a_new_store_is_removed_too(folder, every):
    def columns(rows):
        if rows[0]:
            raise KeyboardInterrupt
        return {name: x[rows] for name, x in every.items()}

    with pytest.raises(KeyboardInterrupt):
        features.write(folder, FACTS, ROWS, columns, quiet)
    new = folder.with_name("features.new")
    assert any(path.stat().st_size for path in new.iterdir())
    features.remove_rows(folder, GONE)
    assert not new.exists()


def test_a_kill_while_rows_are_removed_leaves_none_that_could_be_used(
    folder, monkeypatch
):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features.np, "memmap", killed)
        with pytest.raises(KeyboardInterrupt):
            features.remove_rows(folder, GONE)
    store = features.read(folder, FACTS)
    with pytest.raises(ValueError, match="removed"):
        store.take(GONE[:1])
    # They are still there, which the next purge is told, and mends.
    assert features.count_remaining(folder, GONE) == len(GONE)
    features.remove_rows(folder, GONE)
    assert features.count_remaining(folder, GONE) == 0


@pytest.mark.parametrize("damage", ["about.json", "there.bin", "features.bin"])
@pytest.mark.parametrize("change", ["torn", "gone"])
def test_of_a_damaged_store_nothing_stays_when_rows_are_removed(folder, damage, change):
    if change == "gone":
        (folder / damage).unlink()
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:20])
    assert features.remove_rows(folder, GONE) == 0
    assert not folder.exists() and features.count_remaining(folder, GONE) == 0


def test_a_purge_reaches_the_stores_of_all_seeds_also_those_that_were_cut_off(
    tmp_path, every
):
    place = {
        seed: tmp_path / "checkpoints" / f"original-{seed}" / "features"
        for seed in range(4)
    }
    for seed in (0, 1, 2):
        store_at(place[seed], every)
    # Killed while the features were stored, for the first time and once more.
    place[1].rename(place[1].with_name("features.new"))
    shutil.copytree(place[2], place[2].with_name("features.new"))
    ids = np.array([f"row{row}" for row in range(ROWS)])
    bench = types.SimpleNamespace(workdir=tmp_path, data=types.SimpleNamespace(id=ids))
    gone = {f"row{row}" for row in GONE.tolist()}
    assert purge._purge_features(bench, gone) == 2 * len(GONE)
    assert sorted(tmp_path.rglob("features*")) == sorted(
        [place[0], place[0] / "features.bin", place[2], place[2] / "features.bin"]
    )
    for folder in (place[0], place[2]):
        assert features.count_remaining(folder, GONE) == 0
        assert features.count_remaining(folder, np.arange(ROWS)) == ROWS - len(GONE)


# --- methods and evaluation on a store ------------------------------------------------


@pytest.fixture
def stored(problem, folder, every):
    """The problem with its store, and without a way to look at pictures."""
    facts = features.store_identity(problem.params, "toy0")
    store_at(folder, every, facts)

    class Blind(Forward):
        def _encoded(self, *args):
            raise AssertionError("a pass over pictures")

        encode = _encoded

    return problem._replace(
        store=features.read(folder, facts),
        forward=Blind(problem.model, problem.executor, 32),
    )


def arrays_of(program):
    params, opt = program.params, init_state(program, jax.random.key(0)).opt
    return jax.tree.leaves(
        (params, opt, program.frozen, program.sharded_tables, program.aux)
    )


@pytest.mark.parametrize("name", ["ccu", "ccu_plus"])
def test_a_method_starts_from_the_store_without_a_pass_over_pictures(
    problem, stored, name
):
    fast = METHODS[name](stored._replace(method=name))
    slow = METHODS[name](problem._replace(method=name))
    assert fast.plan.keys() == slow.plan.keys()
    for part, plan in fast.plan.items():
        np.testing.assert_array_equal(plan, slow.plan[part])
    for one, other in zip(arrays_of(fast), arrays_of(slow), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ccu", "ccu_plus"])
def test_features_are_computed_where_that_is_asked_for(stored, name):
    asked = toy.make_config(run={"features": "computed"})
    with pytest.raises(AssertionError, match="a pass over pictures"):
        METHODS[name](stored._replace(method=name, config=asked))


def test_a_removed_row_ends_a_method_before_its_first_step(folder, stored):
    features.remove_rows(folder, stored.sets.unlearn[:1])
    store = features.read(folder, features.store_identity(stored.params, "toy0"))
    with pytest.raises(ValueError, match="removed"):
        METHODS["ccu_plus"](stored._replace(store=store, method="ccu_plus"))


class Quiet:
    """A stage that nobody watches."""

    def update(self, *args, **kwargs):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ccu", "ccu_plus"])
def test_a_run_on_stored_features_is_one_on_computed_ones_but_for_rounding(
    tmp_path, name, dtype
):
    settings = toy.make_config(
        model={"dtype": dtype}, **{name: {"steps": 5}}, run={"steps_per_call": 2}
    )
    problem = toy.make_problem(parallel.vmap(2), settings=settings)
    fresh = features.init_untrained(problem.model, 0)
    of = problem.forward, problem.params, fresh, problem.table
    store_at(tmp_path / "features", features.compute_features(*of, np.arange(ROWS)))
    store = features.read(tmp_path / "features", FACTS)
    loop = Loop(settings.run, problem.executor, pytest.fail)
    found = {}
    for kind, chosen in (("stored", store), ("computed", None)):
        outcome = loop.run(
            name,
            METHODS[name],
            problem._replace(store=chosen),
            tmp_path / kind,
            Quiet(),
        )
        params = {**problem.params, **outcome.params}
        out = problem.forward.outputs(params, problem.table, np.arange(ROWS))
        found[kind] = {view: out[view] for view in VIEWS}
        assert outcome.diverged is None and set(outcome.params) == set(TAIL)
    # The first state; the steps, by their shapes and by their text.
    assert len(loop._compiled) == 3, "one program for both"
    for view, logits in found["stored"].items():
        # Five steps of Adam grow what rounding there was.
        np.testing.assert_allclose(logits, found["computed"][view], atol=1e-3)
    before = problem.forward.outputs(problem.params, problem.table, np.arange(ROWS))
    for logits in found.values():
        assert logits["text"].tobytes() == before["text"].tobytes()
        assert logits["fused"].tobytes() != before["fused"].tobytes()


def test_outputs_from_the_store_are_those_from_the_pictures(problem, stored):
    table = stored.store.as_table(problem.table)
    assert not {"image", "text"} & set(table)
    of = problem.params, problem.table, toy.make_dataset(), problem.sets
    expected = predictions.predict_all_splits(problem.forward, *of)
    found = predictions.predict_all_splits(stored.forward, of[0], table, *of[2:])
    for view, logits in expected.logits.items():
        np.testing.assert_allclose(found.logits[view], logits, atol=1e-6)
    np.testing.assert_allclose(found.pair, expected.pair, atol=1e-6)
    for name in ("labels", "split", "id", "has_image", "has_text"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    # With another tail the text's own word stays, to the bit.
    tail = {name: jax.tree.map(lambda x: x + 0.1, of[0][name]) for name in TAIL}
    changed = predictions.predict_all_splits(
        stored.forward, {**of[0], **tail}, table, *of[2:]
    )
    assert changed.logits["text"].tobytes() == found.logits["text"].tobytes()
    assert changed.logits["image"].tobytes() != found.logits["image"].tobytes()


# --- whole runs -----------------------------------------------------------------------


def pictures(folder, rows=80):
    """Rows of one's own in two classes; some have no picture, some no text."""
    folder.mkdir()
    draw, lines = np.random.default_rng(0), []
    for row in range(rows):
        entry = {"id": f"row{row}", "label": "cat" if row % 2 else "dog"}
        if row % 10 != 7:
            pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            entry["image"] = f"{row}.png"
        if row % 10 != 8:
            entry["text"] = f"text of {row}"
        splits = ["train", "train", "train", "validation", "test"]
        lines.append({**entry, "split": splits[row // 2 % 5]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a run of its own small pictures."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    pictures(folder)
    tiny = toy.make_config(
        train={"epochs": 1}, ccu_plus={"steps": 4, "shrink": 1.0}, ccu={"steps": 4}
    )
    own = Data(dir=str(folder), image_size=8, text_length=6, vocabulary=120)
    return dataclasses.replace(tiny, data=own, methods=("original", "ccu_plus"))


class Looks(list):
    """What models were asked to look at or to read, each time that was traced."""

    def watch(self, monkeypatch):
        build = run.models.build

        def watched(*args, **kwargs):
            model = build(*args, **kwargs)

            def trunk(params, image):
                self.append("picture")
                return model.trunk(params, image)

            def read(params, text):
                self.append("text")
                return model.encode_text(params, text)

            def apply(params, example, **kwargs):
                self.extend({"image", "text"} & set(example) - {"text"})
                return model.apply(params, example, **kwargs)

            return model._replace(trunk=trunk, read=read, apply=apply)

        monkeypatch.setattr(run.models, "build", watched)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a finished run, and what its model looked at."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    workdir.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        looks = Looks()
        looks.watch(monkeypatch)
        run.run(settings, workdir)
    return workdir, looks


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the folder, in which ccu_plus is still to be run."""
    workdir = pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))
    (workdir / "stages" / "ccu_plus-0.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "ccu_plus-0")
    return workdir


def outputs(workdir, method="ccu_plus"):
    return predictions.load_predictions(workdir / "outputs" / f"{method}-0.npz")


def assert_the_same_run(one, other, atol=0.0):
    one, other = outputs(one), outputs(other)
    assert one.id.tolist() == other.id.tolist()
    for view, logits in one.logits.items():
        np.testing.assert_allclose(logits, other.logits[view], rtol=0, atol=atol)


@pytest.mark.slow
def test_a_request_on_a_finished_original_makes_no_pass_over_pictures(
    settings, finished, again, monkeypatch
):
    whole = contents(finished[0] / "checkpoints" / "original-0" / "features")
    looks = Looks()
    looks.watch(monkeypatch)
    run.run(settings, again)
    assert "picture" in finished[1], "the original's own features came from somewhere"
    assert looks == []
    assert contents(again / "checkpoints" / "original-0" / "features") == whole
    assert_the_same_run(finished[0], again)
    row = json.loads((again / "stages" / "ccu_plus-0.json").read_text())
    assert row["features"] == "stored" and row["text_unchanged"] is True
    before, after = outputs(again, "original"), outputs(again)
    assert before.logits["text"].tobytes() == after.logits["text"].tobytes()
    assert before.logits["image"].tobytes() != after.logits["image"].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "torn", "of another checkpoint", "no json"])
def test_a_store_that_does_not_fit_is_made_again(
    settings, finished, again, damage, monkeypatch
):
    folder = again / "checkpoints" / "original-0" / "features"
    whole = contents(folder)
    about = folder / "about.json"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "torn":
        (folder / "features.bin").write_bytes(whole["features.bin"][:-4])
    elif damage == "no json":
        about.write_text(about.read_text()[:40])
    else:
        facts = json.loads(about.read_text())
        about.write_text(json.dumps({**facts, "checkpoint": "0" * 64}))
        (folder / "features.bin").write_bytes(bytes(len(whole["features.bin"])))
    looks = Looks()
    looks.watch(monkeypatch)
    run.run(settings, again)
    assert "picture" in looks
    assert contents(folder) == whole
    assert_the_same_run(finished[0], again)


@pytest.mark.slow
def test_features_computed_at_each_request_lead_to_the_same_results(
    settings, finished, again, monkeypatch
):
    asked = dataclasses.replace(settings.run, features="computed")
    looks = Looks()
    looks.watch(monkeypatch)
    run.run(dataclasses.replace(settings, run=asked), again)
    assert "picture" in looks
    row = json.loads((again / "stages" / "ccu_plus-0.json").read_text())
    assert row["features"] == "computed" and row["text_unchanged"] is True
    assert_the_same_run(finished[0], again, atol=1e-3)


@pytest.mark.slow
def test_the_original_is_evaluated_by_what_was_stored_of_it(settings, finished):
    workdir, _ = finished
    folder = workdir / "checkpoints" / "original-0"
    about = json.loads((folder / "features" / "about.json").read_text())
    facts = {name: about[name] for name in ("checkpoint", "fingerprint")}
    store = features.read(folder / "features", facts)
    found = outputs(workdir, "original")
    ids = data.load_prepared(settings.data, workdir).id.tolist()
    where = {name: row for row, name in enumerate(ids)}
    rows = np.array([where[name] for name in found.id.tolist()])
    assert len(store.valid) == 80
    for view, logits in found.logits.items():
        stored = store.take(rows)[f"original_{view}"]
        np.testing.assert_allclose(logits, stored, atol=1e-6)


def test_nothing_is_left_of_no_rows(folder):
    assert features.count_remaining(folder, np.array([], int)) == 0
