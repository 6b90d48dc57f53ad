"""Reads files of unknown origin, confined to their folder and limited in size.

An unusable file raises `SkipExample` with the reason, which is counted.
"""

import errno
import functools
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

from ccu_jax.data.readers.base import SkipExample
from ccu_jax.errors import UserError

MAX_IMAGE_BYTES = 256 << 20  # of an encoded image
MAX_TEXT_BYTES = 4 << 20  # of a file with one row's text; parsing takes up to 30x
MAX_LINE_BYTES = 1 << 20  # of a line of an index; longer lines are skipped
# JSON can contain lone surrogates, which UTF-8 cannot encode.
_SURROGATES = re.compile("[\ud800-\udfff]")
_MAX_PATH = 4096  # characters; resolving a longer path would take minutes
_MISSING_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
NumberedLines = Iterator[tuple[int, bytes | None]]  # None: the line is too long


class Folder:
    """Reads files below a folder, and refuses links that lead out of it."""

    def __init__(self, root: pathlib.Path):  # noqa: D107
        self.root = pathlib.Path(os.path.realpath(root))
        # Consecutive rows share a folder, so it is resolved once.
        is_inside = functools.partial(is_within, folder=self.root)
        self._is_inside = functools.lru_cache(1024)(is_inside)

    def read(self, name: str, role: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """Returns the content of a file.

        Args:
            name: the path below the folder, as written in the data set.
            role: what the file is called in messages: "image" in "image missing".
            max_bytes: size limit.

        Raises:
            SkipExample: the file is missing, outside the folder, too large, not a
                regular file, or unreadable.
        """
        path = self._resolve(name, role)
        try:
            # Without O_NONBLOCK, opening a named pipe would block forever.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except UnicodeEncodeError:
            raise SkipExample(f"{role} missing") from None
        except OSError as error:
            reason = "missing" if error.errno in _MISSING_ERRORS else "cannot be read"
            raise SkipExample(f"{role} {reason}") from None
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):  # fdopen would raise for a folder
            os.close(handle)
            raise SkipExample(f"{role} is no plain file")
        with os.fdopen(handle, "rb") as file:
            if status.st_size > max_bytes:
                raise SkipExample(f"{role} too large")
            try:
                return file.read(status.st_size)
            except OSError:
                raise SkipExample(f"{role} cannot be read") from None

    def read_text(self, name: str, role: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """Returns the content of a UTF-8 file; raises SkipExample, like `read`."""
        return decode_utf8(self.read(name, role, max_bytes), role)

    def _resolve(self, name: str, role: str) -> str:
        """Returns the absolute path; raises SkipExample if it leaves the folder."""
        outside = SkipExample(f"{role} outside of the folder")
        if not name or "\0" in name or len(name) > _MAX_PATH:
            raise SkipExample(f"{role} missing")
        # Windows paths are recognized on every system.
        parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
        has_drive = re.match("[A-Za-z]:", name)
        if os.path.isabs(name) or name[:1] in "/\\" or ".." in parts or has_drive:
            raise outside
        try:
            path = os.path.join(self.root, name)
            if not self._is_inside(os.path.dirname(path)):
                raise outside
            if os.path.islink(path) and not is_within(path, self.root):
                raise outside
        except (OSError, ValueError):  # a loop of links; a name that cannot be encoded
            raise SkipExample(f"{role} missing") from None
        return path


def is_within(path: str | pathlib.Path, folder: str | pathlib.Path) -> bool:
    """Returns whether a path, with links resolved, is `folder` or lies below it."""
    # Path.resolve raises on a loop of links.
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(os.path.join(root, ""))


def reject_external_links(folders: dict[pathlib.Path, pathlib.Path]) -> None:
    """Raises UserError if a path resolves outside its folder, `{path: folder}`."""
    for path, folder in folders.items():
        if not is_within(path, folder):
            raise UserError(
                f"{path} is a link out of its folder: replace it with its target, or "
                "set data.dir to a folder that contains all files"
            )


def quote(text: str) -> str:
    """Quotes and shortens text of unknown origin for a one-line message."""
    return ascii(text[:100])


def decode_utf8(data: bytes, role: str) -> str:
    """Decodes UTF-8, with or without a byte-order mark; raises SkipExample."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipExample(f"{role} is not UTF-8") from None


def clean_text(text: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Strips a text and replaces the characters that cannot be stored.

    Returns the text, or None if it is blank, and notes to count.
    """
    notes: tuple[str, ...] = ()
    if text and "\0" in text:
        text, notes = text.replace("\0", " "), ("noted: NUL characters in a text",)
    if text and _SURROGATES.search(text):
        text = _SURROGATES.sub("\ufffd", text)
        notes += ("noted: broken characters in a text",)
    return (text or "").strip() or None, notes


def parse_json(text: str, role: str) -> Any:
    """Parses JSON; raises SkipExample if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SkipExample(f"{role} is no valid JSON") from None


def iter_lines(path: pathlib.Path, with_blank: bool = False) -> NumberedLines:
    r"""Yields (line number from 1, line); the line is None if it is too long.

    Lines end at "\n" or "\r\n", which is removed; `str.splitlines` would also split
    inside texts (at U+0085). Memory is bounded even for an endless line. Blank lines
    are always numbered, but yielded only if `with_blank` is true.
    """
    number, is_continued = 0, False
    with path.open("rb") as file:
        while piece := file.readline(MAX_LINE_BYTES + 1):
            is_last = piece.endswith(b"\n")
            if not is_continued:
                number += 1
                is_too_long = not is_last and len(piece) > MAX_LINE_BYTES
                line = None if is_too_long else piece.rstrip(b"\n").rstrip(b"\r")
                if with_blank or line is None or line.strip():
                    yield number, line
            is_continued = not is_last


def decode_line(line: bytes | None) -> str:
    """Decodes a line from `iter_lines`; raises SkipExample if too long or not UTF-8."""
    if line is None:
        raise SkipExample("line too long")
    return decode_utf8(line, "line")


def parse_json_line(line: bytes | None) -> dict[str, Any]:
    """Parses the JSON object in a line from `iter_lines`; raises SkipExample."""
    value = parse_json(decode_line(line), "line")
    if not isinstance(value, dict):
        raise SkipExample("line is no JSON object")
    return value
