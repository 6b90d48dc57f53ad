"""Checkpoints come back to the bit, or not at all and with a complaint."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax.errors import UserError, user_error_for
from ccu_jax.train import checkpoint
from ccu_jax.train.program import State


def state(step=0):
    """A state like that of a training run, with bits that are easily lost."""
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


class Complaints(list):
    def __call__(self, text):
        assert "\n" not in text
        self.append(text)


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of the steps 4 and 8."""
    for step in (4, 8):
        checkpoint.save(tmp_path / "steps", step, state(step), {"seconds": step / 8})
    return tmp_path / "steps"


@pytest.fixture
def complaints():
    return Complaints()


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def restored(folder, complaints):
    return checkpoint.restore(folder, state(), complaints)


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_a_state_comes_back_to_the_bit(folder, complaints):
    saved = restored(folder, complaints)
    assert saved.step == 8 and saved.facts == {"seconds": 1.0}
    assert isinstance(saved.tree, State)
    same_bits(saved.tree, state(8))
    assert not complaints


def test_shapes_alone_are_enough_to_restore(folder, complaints):
    shapes = jax.eval_shape(state)
    same_bits(checkpoint.restore(folder, shapes, complaints).tree, state(8))


def test_a_folder_without_checkpoints_holds_nothing(tmp_path, complaints):
    assert restored(tmp_path / "none", complaints) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert restored(tmp_path / "empty", complaints) is None
    assert not complaints


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(
    folder, complaints, place
):
    path = largest_file(folder / "8")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    saved = restored(folder, complaints)
    assert saved.step == 4 and saved.facts == {"seconds": 0.5}
    same_bits(saved.tree, state(4))
    assert len(complaints) == 1 and str(folder / "8") in complaints[0]


def test_a_truncated_checkpoint_is_passed_over(folder, complaints):
    path = largest_file(folder / "8")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert restored(folder, complaints).step == 4
    assert len(complaints) == 1


def test_a_checkpoint_whose_files_are_gone_is_passed_over(folder, complaints):
    largest_file(folder / "8").unlink()
    assert restored(folder, complaints).step == 4
    assert len(complaints) == 1


def test_where_all_are_damaged_there_is_none_and_each_is_named(folder, complaints):
    for step in ("4", "8"):
        path = largest_file(folder / step)
        path.write_bytes(b"")
    assert restored(folder, complaints) is None
    assert len(complaints) == 2
    assert all(any(str(folder / s) in text for text in complaints) for s in "48")


def without_bias(like):
    return like._replace(params={"head": {"kernel": like.params["head"]["kernel"]}})


def with_another_part(like):
    return like._replace(params={**like.params, "tail": jnp.zeros(3)})


def with_another_shape(like):
    return like._replace(aux={**like.aux, "targets": jnp.ones((5, 3))})


@pytest.mark.parametrize(
    "change, named",
    [
        (without_bias, "params.head.bias"),
        (with_another_part, "params.tail"),
        (with_another_shape, "aux.targets"),
    ],
)
def test_other_arrays_than_expected_are_refused_by_name(
    folder, complaints, change, named
):
    assert checkpoint.restore(folder, change(state()), complaints) is None
    assert len(complaints) == 2 and all(named in text for text in complaints)


def test_the_newest_two_are_kept(folder, complaints):
    checkpoint.save(folder, 12, state(12), {})
    assert sorted(path.name for path in folder.iterdir()) == ["12", "8"]
    assert restored(folder, complaints).step == 12


def test_a_step_that_is_saved_again_is_replaced_by_what_is_new(folder, complaints):
    """A run that goes on from step 4, since 8 was damaged, comes by step 8 again."""
    largest_file(folder / "8").write_bytes(b"")
    assert restored(folder, complaints).step == 4
    checkpoint.save(folder, 8, state(9), {"seconds": 2.0})
    saved = restored(folder, Complaints())
    assert saved.step == 8 and saved.facts == {"seconds": 2.0}
    same_bits(saved.tree, state(9))


def test_relative_folders_are_fine(tmp_path, monkeypatch, complaints):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(pathlib.Path("here"), 1, state(1), {})
    assert restored(pathlib.Path("here"), complaints).step == 1


@pytest.mark.slow
def test_a_checkpoint_without_orbax_notes_is_restored_without_a_word(tmp_path):
    """As a kill leaves it between the data and the notes of the manager."""
    checkpoint.save(tmp_path, 3, {"x": np.arange(4.0)}, {"seed": 1})
    notes = list(tmp_path.rglob("_CHECKPOINT_METADATA"))
    assert notes
    for note in notes:
        note.unlink()
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


def test_a_disk_without_room_is_told_in_one_line(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000)
    )
    with pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path / "steps", 1, {"x": np.zeros(3)}, {})
    assert str(user_error_for(caught.value)) == (
        f"no space left at {tmp_path / 'steps'}; free some, then rerun the "
        "same command to resume"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("INTERNAL: read: Stale file handle [source locations='x']"),
        ValueError("PERMISSION_DENIED: Error opening: Permission denied [x]"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
    ],
)
def test_what_cannot_be_read_for_now_is_not_taken_for_damage(
    tmp_path, monkeypatch, error
):
    tree = {"x": np.arange(3.0)}
    for step in (1, 2):
        checkpoint.save(tmp_path / "steps", step, tree, {})
    read, told = checkpoint._read, []

    def fails(ocp, manager, step):
        raise error

    monkeypatch.setattr(checkpoint, "_read", fails)
    with pytest.raises(type(error)) as caught:
        checkpoint.restore(tmp_path / "steps", tree, told.append)
    assert user_error_for(caught.value) is not None and not told
    monkeypatch.setattr(checkpoint, "_read", read)
    assert checkpoint.restore(tmp_path / "steps", tree, told.append).step == 2


def test_a_folder_that_was_removed_while_it_was_written_is_named(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    with pytest.raises(UserError, match=f"{folder}: missing; was it removed"):
        with checkpoint._watched(folder):
            shutil.rmtree(folder)
            folder.mkdir()
            raise ValueError("NOT_FOUND")


def test_a_file_in_a_folder_that_is_gone_is_told_in_one_line(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "went" / "file").write_text("x")
    assert f"{tmp_path / 'went'}: missing" in str(user_error_for(caught.value))
    with pytest.raises(OSError) as caught:
        (tmp_path / "file").read_text()
    assert user_error_for(caught.value) is None


def test_what_a_thread_of_orbax_says_too_late_is_left_out_and_all_else_told(
    monkeypatch, folder, complaints
):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: told.append(error[1]))
    for where, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(where, name, lambda error: told.append(error.exc_value))
    for _ in range(3):
        checkpoint.restore(folder, state(), complaints)
    mine = RuntimeError("another one")
    for error in (RuntimeError("Event loop is closed"), mine):
        given = types.SimpleNamespace(exc_value=error)
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(given)
        threading.excepthook(given)
    assert told == [mine] * 3
