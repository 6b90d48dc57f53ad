"""Checkpoints: the only file that knows Orbax.

Orbax writes them so that a kill leaves either a whole checkpoint or none. It restores
damaged data without a word, though, so each array's SHA-256 is stored beside it, and
one of all that is stored so, and compared; a damaged checkpoint is named and the one
before it used.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.distributed.hosts import (
    all_agree,
    broadcast_from_primary,
    is_primary,
    wait_until_visible,
)
from ccu_jax.errors import UserError, is_transient, missing_folder_message
from ccu_jax.storage.records import add_checksum, verify_checksum

_ROOM = 1 << 20  # bytes of a checkpoint that are not those of its arrays


class Saved(NamedTuple):
    """What was restored: the step, the tree of NumPy arrays, and the plain facts."""

    step: int
    tree: Any
    facts: dict


def _manager(directory, keep):
    # Imported late: the import takes seconds, and not every command needs it.
    import orbax.checkpoint as ocp
    from absl import logging

    # What is missing or damaged is told in this project's own words.
    logging.set_verbosity(logging.FATAL)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
    )
    return ocp, ocp.CheckpointManager(directory.resolve(), options=options)


def save(directory: pathlib.Path, step: int, tree: Any, facts: dict, keep: int = 2):
    """Write a checkpoint and return when it is complete; every process calls this.

    Those of the same and of later steps are replaced.

    Args:
        directory: of the checkpoints of one stage.
        step: its number.
        tree: arrays; leaves that are the same on all devices.
        facts: plain JSON to go with it.
        keep: how many checkpoints to keep.
    """
    leaves = {name: np.asarray(x) for name, x in _leaves(tree)}
    about = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": _digest(x)}
        for name, x in leaves.items()
    }
    _require_room(directory, sum(x.nbytes for x in leaves.values()))
    ocp, manager = _manager(directory, keep)
    with _watched(directory), _quiet(), manager:
        # Left by a run that was killed before it noted the end, or damaged.
        for old in [s for s in manager.all_steps() if s >= step]:
            manager.delete(old)
        manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(leaves),
                meta=ocp.args.JsonSave(
                    add_checksum({"arrays": about, "facts": facts, "step": step})
                ),
            ),
            force=True,
        )
        manager.wait_until_finished()


def restore(
    directory: pathlib.Path, like: Any, complain: Callable[[str], None]
) -> Saved | None:
    """The newest undamaged checkpoint, or None where there is none.

    Args:
        directory: as given to `save`.
        like: a tree of the same structure and shapes.
        complain: told of every checkpoint that had to be passed over.
    """
    if not wait_until_visible(directory):
        return None
    ocp, manager = _manager(directory, None)
    with _quiet(), manager:
        for step in _candidates(manager):
            wait_until_visible(
                directory / str(step)
            )  # it comes here, too, before it is read
            saved, first = None, "another process cannot read it"
            try:
                leaves, facts = _read(ocp, manager, step)
                saved = Saved(step, _rebuild(like, leaves), facts)
            except Exception as error:
                if is_transient(error):  # then it is none of the checkpoint's
                    raise
                first = (str(error).splitlines() or [type(error).__name__])[0][:200]
            # All go on from the same one.
            if all_agree(saved is not None):
                return saved
            complain(f"checkpoint {directory / str(step)} is unusable: {first}")
    return None


def _candidates(manager) -> list[int]:
    """The steps to try, the newest first: those that process 0 sees."""
    steps = np.array(sorted(manager.all_steps(), reverse=True), np.int32)
    count = int(broadcast_from_primary(np.array(len(steps), np.int32)))
    return broadcast_from_primary(np.resize(steps, count)).tolist() if count else []


def _require_room(directory, size):
    """Raises OSError where the disk is too full, in words that Orbax does not have."""
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(directory).free < size + _ROOM:
        full = errno.ENOSPC
        raise OSError(full, os.strerror(full), str(directory))


@contextlib.contextmanager
def _watched(directory) -> Iterator[None]:
    """Tells of a folder that was removed in the meantime, even if it is there again."""
    held = os.open(directory, os.O_RDONLY)
    try:
        yield
    except Exception as error:
        if not os.fstat(held).st_nlink:
            raise UserError(missing_folder_message(directory)) from error
        raise
    finally:
        os.close(held)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Threads of Orbax print what has befallen them; the caller is told it anyhow."""
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = sys.unraisablehook = threading.excepthook = _say_nothing
    try:
        yield
    finally:
        hooks = [hook if isinstance(hook, _Late) else _Late(hook) for hook in hooks]
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks


class _Late:
    """A hook that leaves out what a thread of Orbax says when nobody waits for it."""

    def __init__(self, hook):
        self._hook = hook

    def __call__(self, *told):
        error = told[1] if len(told) == 3 else told[0].exc_value
        if str(error) != "Event loop is closed":
            self._hook(*told)


def _say_nothing(*told):
    """A hook for exceptions that nobody can catch."""


def _read(ocp, manager, step):
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    told = verify_checksum(meta["meta"])
    about = told["arrays"]
    if told["step"] != step:
        raise ValueError(f"it is of step {told['step']}")
    blank = {name: np.zeros(a["shape"], a["dtype"]) for name, a in about.items()}
    leaves = manager.restore(
        step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(blank))
    )["arrays"]
    leaves = {name: np.asarray(x) for name, x in leaves.items()}
    wrong = [n for n in about if _digest(leaves[n]) != about[n]["sha256"]]
    if wrong:
        raise ValueError(f"the data of {wrong[0]} do not match their digest")
    return leaves, told["facts"]


def remove(directory: pathlib.Path) -> None:
    """Removes the checkpoints of a stage that is over; every process may call this."""
    if is_primary():
        shutil.rmtree(directory, ignore_errors=True)


def written(directory: pathlib.Path) -> dict[str, str]:
    """The digests of the newest checkpoint's arrays, by name, as they stand there.

    Empty where there is none, or they cannot be read.
    """
    try:
        steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
        path = directory / str(max(steps)) / "meta" / "metadata"
        about = json.loads(path.read_text(encoding="utf-8"))["arrays"]
        return {name: one["sha256"] for name, one in about.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def digest(tree: Any) -> str:
    """SHA-256 of all arrays of a tree, with their names: which parameters these are."""
    all_of = hashlib.sha256()
    for name, x in sorted(_leaves(tree)):
        all_of.update(f"{name} {_digest(np.asarray(x))}\n".encode())
    return all_of.hexdigest()


def _digest(array):
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _leaves(tree):
    """Each leaf with its path as a name that is also a safe file name."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(_part(p) for p in path) or "value", leaf


def _part(entry):
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    raise TypeError(f"no name for {entry!r}")


def _rebuild(like, leaves):
    wanted = dict(_leaves(like))
    for name in [*wanted, *leaves]:
        if name not in leaves or name not in wanted:
            raise ValueError(f"it holds other arrays than expected, {name} for one")
        if leaves[name].shape != wanted[name].shape:
            raise ValueError(f"{name} has another shape than expected")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in wanted])
