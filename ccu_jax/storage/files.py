"""Atomic writes, the lock of a working folder, and conversion to plain JSON."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import platform
import re
from typing import Any


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file so that a kill or power loss leaves the old or the new content.

    The content goes to a temporary file beside it, is synced and then renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def try_lock(stack: contextlib.ExitStack, workdir: pathlib.Path) -> str:
    """Locks a working folder until `stack` closes, unless another process has done so.

    Creates the folder and removes temporary files of killed `write_atomically` calls.
    Returns a description of the process that has the lock, or "" for this process.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((workdir / "run.lock").open("a+b"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read(200).decode("utf-8", "replace").strip() or "just started"
    except OSError as error:  # a file system without locks
        print(
            f"*** {workdir}: cannot be locked ({error.strerror}); make sure that no "
            "other run uses it ***"
        )
        return ""
    for temporary in workdir.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", temporary.name):
            temporary.unlink(missing_ok=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()
    return ""


def to_plain_json(value: Any) -> Any:
    """Converts arrays to lists, NaN and infinity to None, other objects to strings."""
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain_json(item) for item in value]
    return str(value)
