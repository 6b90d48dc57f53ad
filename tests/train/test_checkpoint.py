"""Checkpoints are restored to the bit, or rejected with a warning."""

import errno
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import types
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.errors import UserError, user_error_for
from ccu_jax.train import checkpoint
from ccu_jax.train.program import State
from tests.toy import fail_on_warning, trees_equal


def make_state(step=0):
    """Returns a training state with NaN, infinity, -0 and a denormal number."""
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


def restore(folder, like=None) -> tuple[Any, list[str]]:
    """Returns the restored checkpoint, and the warnings."""
    warnings = []
    saved = checkpoint.restore(folder, like or make_state(), warnings.append)
    assert all("\n" not in text for text in warnings)
    return saved, warnings


def assert_restored(folder, step, state, seconds, like=None):
    """Checks the restored checkpoint; returns the warnings."""
    saved, warnings = restore(folder, like)
    assert saved.step == step and saved.metadata == {"seconds": seconds}
    assert isinstance(saved.tree, State) and trees_equal(saved.tree, state)
    return warnings


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_state_is_restored_to_the_bit(folder):
    for like in (make_state(), jax.eval_shape(make_state)):
        assert not assert_restored(folder, 8, make_state(8), 1.0, like)


def test_folder_without_checkpoints_gives_none(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        assert restore(folder) == (None, [])
    assert not (tmp_path / "missing").exists()


def flip_bit(path, fraction):
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    **{f"bit at {x}": functools.partial(flip_bit, fraction=x) for x in (0.1, 0.5, 0.9)},
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": pathlib.Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_restore_falls_back_to_the_previous_checkpoint(folder, damage):
    DAMAGES[damage](largest_file(folder / "8"))
    (warning,) = assert_restored(folder, 4, make_state(4), 0.5)
    assert str(folder / "8") in warning


@pytest.mark.parametrize(
    "array, fields",
    [
        ("params.head.bias", {"params": {"head": {"kernel": jnp.zeros((40, 30))}}}),
        ("params.tail", {"params": {**make_state().params, "tail": jnp.zeros(3)}}),
        ("aux.targets", {"aux": {**make_state().aux, "targets": jnp.ones((5, 3))}}),
    ],
)
def test_every_checkpoint_with_unexpected_arrays_is_named(folder, array, fields):
    saved, warnings = restore(folder, make_state()._replace(**fields))
    assert saved is None
    for text, step in zip(warnings, (8, 4), strict=True):
        assert array in text and str(folder / str(step)) in text


def test_only_the_newest_two_checkpoints_remain_in_a_relative_folder(
    folder, monkeypatch
):
    monkeypatch.chdir(folder.parent)
    checkpoint.save(pathlib.Path(folder.name), 12, make_state(12), {"seconds": 0})
    assert sorted(path.name for path in folder.iterdir()) == ["12", "8"]
    assert not assert_restored(pathlib.Path(folder.name), 12, make_state(12), 0)


def test_step_that_is_saved_again_is_replaced(folder):
    """A run that resumes from step 4, since 8 is damaged, saves step 8 again."""
    largest_file(folder / "8").write_bytes(b"")
    assert assert_restored(folder, 4, make_state(4), 0.5)
    checkpoint.save(folder, 8, make_state(9), {"seconds": 2.0})
    assert not assert_restored(folder, 8, make_state(9), 2.0)


@pytest.mark.slow
def test_checkpoint_without_orbax_metadata_is_restored_silently(tmp_path):
    """A kill between data and metadata of the manager leaves such a checkpoint."""
    checkpoint.save(tmp_path, 3, {"x": np.arange(4.0)}, {"seed": 1})
    for path in (paths := list(tmp_path.rglob("_CHECKPOINT_METADATA"))):
        path.unlink()
    assert paths
    code = (
        "import pathlib, sys, numpy as np; from ccu_jax.train import checkpoint; "
        "saved = checkpoint.restore(pathlib.Path(sys.argv[1]), "
        "{'x': np.zeros(4)}, print); print(saved.step, saved.tree['x'].tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3 [0.0, 1.0, 2.0, 3.0]\n", "")


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
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
def test_transient_read_error_is_not_taken_for_damage(folder, monkeypatch, error):
    monkeypatch.setattr(checkpoint, "_read", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as caught:
        checkpoint.restore(folder, make_state(), fail_on_warning)
    assert user_error_for(caught.value) is not None


def test_folder_that_is_removed_during_a_save_is_named(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()

    @checkpoint._raise_if_removed(folder)
    def save():
        shutil.rmtree(folder)
        folder.mkdir()
        raise ValueError("NOT_FOUND")

    with pytest.raises(UserError, match=f"{folder}: missing; was it removed"):
        save()


def test_late_errors_of_orbax_threads_are_dropped_and_others_are_not(
    monkeypatch, folder
):
    reported = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: reported.append(error[1]))
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(
            module, name, lambda error: reported.append(error.exc_value)
        )
    for _ in range(3):
        restore(folder)
    other = RuntimeError("another error")
    for error in (RuntimeError("Event loop is closed"), other):
        args: Any = types.SimpleNamespace(exc_value=error)
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(args)
        threading.excepthook(args)
    assert reported == [other] * 3
