"""Checkpoints are restored to the bit, or rejected with a warning."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.errors import UserError, user_error_for
from ccu_jax.train import checkpoint
from ccu_jax.train.program import State
from tests.toy import trees_equal


def make_state(step=0):
    """A training state, with bits that are easily lost."""
    rng = np.random.default_rng(step)
    weights = rng.normal(size=(40, 30)).astype(np.float32)
    weights[0, :5] = [np.nan, -0.0, np.inf, 1e-45, 1 + 2**-23]
    params = {"head": {"kernel": jnp.array(weights), "bias": jnp.zeros(30)}}
    return State(
        step=jnp.int32(step),
        params=params,
        opt=(jax.tree.map(jnp.ones_like, params), (), jnp.int32(step)),
        aux={"stopped": jnp.zeros((), bool), "targets": jnp.ones((4, 3))},
        key=jax.random.key_data(jax.random.key(step)),
    )


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of the steps 4 and 8."""
    for step in (4, 8):
        metadata = {"seconds": step / 8}
        checkpoint.save(tmp_path / "steps", step, make_state(step), metadata)
    return tmp_path / "steps"


@pytest.fixture
def warnings():
    return []


def restore(folder, warnings, like=None) -> Any:
    saved = checkpoint.restore(folder, like or make_state(), warnings.append)
    assert all("\n" not in text for text in warnings)
    return saved


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_state_is_restored_to_the_bit(folder, warnings):
    saved = restore(folder, warnings)
    assert saved.step == 8 and saved.metadata == {"seconds": 1.0}
    assert isinstance(saved.tree, State) and trees_equal(saved.tree, make_state(8))
    by_shapes = restore(folder, warnings, jax.eval_shape(make_state))
    assert trees_equal(by_shapes.tree, make_state(8))
    assert not warnings


def test_folder_without_checkpoints_gives_none(tmp_path, warnings):
    assert restore(tmp_path / "none", warnings) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "empty", warnings) is None
    assert not warnings


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda path, place=place: flip(path, place) for place in (0.1, 0.5, 0.9)),
        truncate,
        pathlib.Path.unlink,
    ],
    ids=["flipped 0.1", "flipped 0.5", "flipped 0.9", "truncated", "missing"],
)
def test_restore_falls_back_to_the_previous_checkpoint(folder, warnings, damage):
    damage(largest_file(folder / "8"))
    saved = restore(folder, warnings)
    assert saved.step == 4 and saved.metadata == {"seconds": 0.5}
    assert trees_equal(saved.tree, make_state(4))
    assert len(warnings) == 1 and str(folder / "8") in warnings[0]


def test_every_damaged_checkpoint_is_named(folder, warnings):
    for step in ("4", "8"):
        largest_file(folder / step).write_bytes(b"")
    assert restore(folder, warnings) is None
    assert len(warnings) == 2
    assert all(any(str(folder / s) in text for text in warnings) for s in "48")


def without_bias(state):
    return state._replace(params={"head": {"kernel": state.params["head"]["kernel"]}})


def with_another_module(state):
    return state._replace(params={**state.params, "tail": jnp.zeros(3)})


def with_another_shape(state):
    return state._replace(aux={**state.aux, "targets": jnp.ones((5, 3))})


@pytest.mark.parametrize(
    "change, name",
    [
        (without_bias, "params.head.bias"),
        (with_another_module, "params.tail"),
        (with_another_shape, "aux.targets"),
    ],
)
def test_unexpected_arrays_are_rejected_by_name(folder, warnings, change, name):
    assert restore(folder, warnings, change(make_state())) is None
    assert len(warnings) == 2 and all(name in text for text in warnings)


def test_the_newest_two_are_kept(folder, warnings):
    checkpoint.save(folder, 12, make_state(12), {})
    assert sorted(path.name for path in folder.iterdir()) == ["12", "8"]
    assert restore(folder, warnings).step == 12


def test_step_that_is_saved_again_is_replaced(folder, warnings):
    """A run that resumes from step 4, since 8 is damaged, comes by step 8 again."""
    largest_file(folder / "8").write_bytes(b"")
    assert restore(folder, warnings).step == 4
    checkpoint.save(folder, 8, make_state(9), {"seconds": 2.0})
    saved = restore(folder, [])
    assert saved.step == 8 and saved.metadata == {"seconds": 2.0}
    assert trees_equal(saved.tree, make_state(9))


def test_folder_may_be_relative(tmp_path, monkeypatch, warnings):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(pathlib.Path("here"), 1, make_state(1), {})
    assert restore(pathlib.Path("here"), warnings).step == 1


@pytest.mark.slow
def test_checkpoint_without_orbax_metadata_is_restored_silently(tmp_path):
    """As a kill leaves it between the data and the metadata of the manager."""
    checkpoint.save(tmp_path, 3, {"x": np.arange(4.0)}, {"seed": 1})
    paths = list(tmp_path.rglob("_CHECKPOINT_METADATA"))
    assert paths
    for path in paths:
        path.unlink()
    code = (
        "import pathlib, sys, numpy as np; from ccu_jax.train import checkpoint; "
        "saved = checkpoint.restore(pathlib.Path(sys.argv[1]), "
        "{'x': np.zeros(4)}, print); print(saved.step, saved.tree['x'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.stdout, done.stderr) == ("3 [0.0, 1.0, 2.0, 3.0]\n", "")


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000)
    )
    with pytest.raises(OSError, match="No space") as caught:
        checkpoint.save(tmp_path / "steps", 1, {"x": np.zeros(3)}, {})
    message = str(user_error_for(caught.value))
    assert str(tmp_path / "steps") in message and "space" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("INTERNAL: read: Stale file handle [source locations='x']"),
        ValueError("PERMISSION_DENIED: Error opening: Permission denied [x]"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
    ],
)
def test_transient_read_error_is_not_taken_for_damage(
    tmp_path, monkeypatch, warnings, error
):
    tree = {"x": np.arange(3.0)}
    for step in (1, 2):
        checkpoint.save(tmp_path / "steps", step, tree, {})

    def fail(ocp, manager, step):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_read", fail)
        with pytest.raises(type(error)) as caught:
            restore(tmp_path / "steps", warnings, tree)
    assert user_error_for(caught.value) is not None and not warnings
    assert restore(tmp_path / "steps", warnings, tree).step == 2


def test_folder_that_is_removed_during_a_save_is_named(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()

    @checkpoint._removal_detected(folder)
    def save():
        shutil.rmtree(folder)
        folder.mkdir()
        raise ValueError("NOT_FOUND")

    with pytest.raises(UserError, match=f"{folder}: missing; was it removed"):
        save()


def test_late_errors_of_orbax_threads_are_dropped_and_others_are_not(
    monkeypatch, folder, warnings
):
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: reported.append(error[1]))
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        hook = lambda error: reported.append(error.exc_value)  # noqa: E731
        monkeypatch.setattr(module, name, hook)
    for _ in range(3):
        restore(folder, warnings)
    other = RuntimeError("another error")
    for error in (RuntimeError("Event loop is closed"), other):
        args: Any = types.SimpleNamespace(exc_value=error)
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(args)
        threading.excepthook(args)
    assert reported == [other] * 3
