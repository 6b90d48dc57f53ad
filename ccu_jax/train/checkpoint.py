"""Saves and restores checkpoints; the only module that imports Orbax.

Orbax writes a checkpoint atomically but restores damaged data silently. The SHA-256 of
every array is therefore stored and verified; a damaged checkpoint is reported, and the
previous one is restored.
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

from ccu_jax.distributed import hosts
from ccu_jax.errors import UserError, is_transient, missing_folder_message
from ccu_jax.storage.records import add_checksum, verify_checksum

_OVERHEAD_BYTES = 1 << 20  # size of a checkpoint without its arrays


class Checkpoint(NamedTuple):
    """A restored checkpoint; the leaves of `tree` are NumPy arrays."""

    step: int
    tree: Any
    metadata: dict[str, Any]


def save(
    directory: pathlib.Path,
    step: int,
    tree: Any,
    metadata: dict[str, Any],
    max_to_keep: int = 2,
) -> None:
    """Writes a checkpoint and blocks until it is complete; all processes call this.

    The leaves of `tree` are replicated on all devices; `metadata` is stored as JSON.
    Checkpoints of the same step and of later steps are deleted. Raises OSError if the
    disk is full, and UserError if the directory was removed during the call.
    """
    arrays = {name: np.asarray(x) for name, x in _named_leaves(tree)}
    specs = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": _sha256(x)}
        for name, x in arrays.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(x.nbytes for x in arrays.values()) + _OVERHEAD_BYTES
    if shutil.disk_usage(directory).free < num_bytes:  # Orbax does not raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    ocp, manager = _open_manager(directory, max_to_keep)
    with _raise_if_removed(directory), _silence_threads(), manager:
        # Damaged checkpoints, or those of a run that was killed before the stage ended.
        for later_step in [s for s in manager.all_steps() if s >= step]:
            manager.delete(later_step)
        meta = add_checksum({"arrays": specs, "facts": metadata, "step": step})
        stored = ocp.args.StandardSave(arrays)
        args = ocp.args.Composite(arrays=stored, meta=ocp.args.JsonSave(meta))
        manager.save(step, args=args, force=True)
        manager.wait_until_finished()


def restore(
    directory: pathlib.Path, like: Any, on_warning: Callable[[str], None]
) -> Checkpoint | None:
    """Returns the newest intact checkpoint, or None; the same on all processes.

    `like` is a pytree with the expected structure and shapes. `on_warning` is called
    with a message for every checkpoint that cannot be restored.
    """
    if not hosts.wait_until_visible(directory):
        return None
    ocp, manager = _open_manager(directory, None)
    with _silence_threads(), manager:
        for step in _steps_of_primary(manager):
            hosts.wait_until_visible(directory / str(step))
            saved, reason = None, "another process cannot read it"
            try:
                arrays, metadata = _read(ocp, manager, step)
                tree = _unflatten_like(like, arrays)
                saved = Checkpoint(step, tree, metadata)
            except Exception as error:  # Orbax raises many types
                if is_transient(error):  # not a fault of the checkpoint
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            if hosts.all_agree(saved is not None):
                return saved
            on_warning(f"checkpoint {directory / str(step)} is unusable: {reason}")
    return None


def remove(directory: pathlib.Path) -> None:
    """Deletes the checkpoints of a finished stage, on process 0 only."""
    if hosts.is_primary():
        shutil.rmtree(directory, ignore_errors=True)


def read_digests(directory: pathlib.Path) -> dict[str, str]:
    """Reads the SHA-256 of each array in the newest checkpoint; {} if unreadable."""
    try:
        steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
        path = directory / str(max(steps)) / "meta" / "metadata"
        specs = json.loads(path.read_text(encoding="utf-8"))["arrays"]
        return {name: array["sha256"] for name, array in specs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def hash_tree(tree: Any) -> str:
    """Returns a single SHA-256 over the names and values of all leaves of a pytree."""
    total = hashlib.sha256()
    for name, x in sorted(_named_leaves(tree)):
        total.update(f"{name} {_sha256(np.asarray(x))}\n".encode())
    return total.hexdigest()


def _open_manager(directory, max_to_keep):
    """Imports Orbax; returns the module and a checkpoint manager."""
    # Lazy import: it takes seconds, and some commands never need it.
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # errors are reported by this module
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, create=True, cleanup_tmp_directories=True
    )
    return ocp, ocp.CheckpointManager(directory.resolve(), options=options)


def _steps_of_primary(manager) -> list[int]:
    """Returns the steps of the checkpoints that process 0 sees, newest first."""
    steps = np.array(sorted(manager.all_steps(), reverse=True), np.int32)
    count = int(hosts.broadcast_from_primary(np.array(len(steps), np.int32)))
    steps = np.resize(steps, count)
    return hosts.broadcast_from_primary(steps).tolist() if count else []


def _read(ocp, manager, step):
    """Returns the arrays and metadata of a checkpoint after verifying both."""
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    meta = verify_checksum(meta["meta"])
    specs = meta["arrays"]
    if meta["step"] != step:
        raise ValueError(f"its metadata belongs to step {meta['step']}")
    targets = {name: np.zeros(a["shape"], a["dtype"]) for name, a in specs.items()}
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
    arrays = manager.restore(step, args=args)["arrays"]
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    for name, array in specs.items():
        if _sha256(arrays[name]) != array["sha256"]:
            raise ValueError(f"array {name} does not match its checksum")
    return arrays, meta["facts"]


@contextlib.contextmanager
def _raise_if_removed(directory) -> Iterator[None]:
    """Raises UserError if the directory is removed in the block, even if recreated."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield
    except Exception as error:
        if not os.fstat(descriptor).st_nlink:
            raise UserError(missing_folder_message(directory)) from error
        raise
    finally:
        os.close(descriptor)


class _ThreadErrorFilter:
    """Wraps an exception hook to drop errors that are raised in Orbax's threads."""

    is_silent = False

    def __init__(self, hook):
        self._hook = hook

    def __call__(self, *args):
        error = args[1] if len(args) == 3 else args[0].exc_value
        if not _ThreadErrorFilter.is_silent and str(error) != "Event loop is closed":
            self._hook(*args)


@contextlib.contextmanager
def _silence_threads() -> Iterator[None]:
    """Suppresses tracebacks of Orbax's threads, whose errors the caller receives."""
    hooks = (sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")
    for module, name in hooks:
        hook = getattr(module, name)
        if not isinstance(hook, _ThreadErrorFilter):
            setattr(module, name, _ThreadErrorFilter(hook))
    _ThreadErrorFilter.is_silent = True
    try:
        yield
    finally:
        _ThreadErrorFilter.is_silent = False


def _sha256(array):
    """Returns the SHA-256 of an array's dtype, shape and values."""
    header = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def _named_leaves(tree):
    """Yields the dotted path and the value of each leaf of a pytree."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator=".") or "value", leaf


def _unflatten_like(like, arrays):
    """Arranges arrays, named by leaf path, in a pytree with the structure of `like`."""
    expected = dict(_named_leaves(like))
    if names := expected.keys() ^ arrays.keys():
        problem = "is missing" if min(names) in expected else "is unexpected"
        raise ValueError(f"array {min(names)} {problem}")
    for name, x in expected.items():
        shape = arrays[name].shape
        if shape != x.shape:
            raise ValueError(f"array {name} has shape {shape}, expected {x.shape}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[n] for n in expected])
