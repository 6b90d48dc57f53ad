"""Reading files that somebody else has made: never out of the folder, never too much.

Every way in which a file can be unfit is an `SkipExample` with the reason to count.
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

MAX_IMAGE_BYTES = 256 << 20  # bytes of an encoded picture
MAX_TEXT_BYTES = (
    4 << 20
)  # bytes of a file with one row's text; JSON may take 30 times that
MAX_LINE_BYTES = 1 << 20  # bytes of a line of an index; longer ones are left out
# JSON can hold halves of UTF-16 pairs, which no text file may hold.
_HALVES = re.compile("[\ud800-\udfff]")
_MAX_NAME = 4096  # characters of a path; following a longer one would take minutes


class Folder:
    """The files below one folder, which may itself be a link.

    Args:
        root: the folder; links in it that lead out of it are not followed.
    """

    def __init__(self, root: pathlib.Path):  # noqa: D107
        self.root = pathlib.Path(os.path.realpath(root))
        # Rows of one folder follow each other: it is looked up once.
        self._inside = functools.lru_cache(1024)(self._is_inside)

    def read(self, name: str, what: str, most: int = MAX_IMAGE_BYTES) -> bytes:
        """The bytes of a file.

        Args:
            name: its path below the folder, as a row of the data has it.
            what: what to call it in the reason, such as "picture".
            most: bytes; a larger file is not read.

        Raises:
            SkipExample: "`what` missing", "`what` outside of the folder", "`what` too
                large", "`what` is no plain file", "`what` cannot be read".
        """
        path = self._path(name, what)
        try:
            # Not blocking: opening a pipe would wait for ever.
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
            raise SkipExample(f"{what} missing") from None
        except IsADirectoryError:
            raise SkipExample(f"{what} is no plain file") from None
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
                raise SkipExample(f"{what} missing") from None
            raise SkipExample(f"{what} cannot be read") from None
        # Before it is made a file of Python's, which a folder cannot be.
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            raise SkipExample(f"{what} is no plain file")
        with os.fdopen(handle, "rb") as file:
            if status.st_size > most:
                raise SkipExample(f"{what} too large")
            try:
                # Not `most`: Python would set aside as much memory each time.
                return file.read(status.st_size)
            except OSError:
                raise SkipExample(f"{what} cannot be read") from None

    def text(self, name: str, what: str, most: int = MAX_TEXT_BYTES) -> str:
        """Reads a UTF-8 file; raises SkipExample, also "`what` is not UTF-8"."""
        return decode_utf8(self.read(name, what, most), what)

    def _path(self, name: str, what: str) -> str:
        outside = SkipExample(f"{what} outside of the folder")
        if not name or "\0" in name or len(name) > _MAX_NAME:
            raise SkipExample(f"{what} missing")
        # Also a path of Windows: it means the same wherever the data are read.
        parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
        drive = re.match("[A-Za-z]:", name)
        if os.path.isabs(name) or name[:1] in "/\\" or ".." in parts or drive:
            raise outside
        try:
            path = os.path.join(self.root, name)
            if not self._inside(os.path.dirname(path)):
                raise outside
            if os.path.islink(path) and not self._is_inside(path):
                raise outside
        except (OSError, ValueError):  # a loop of links; a name that cannot be encoded
            raise SkipExample(f"{what} missing") from None
        return path

    def _is_inside(self, path: str) -> bool:
        return is_within(path, self.root)


def is_within(path: str | pathlib.Path, folder: str | pathlib.Path) -> bool:
    """Whether what a path leads to, by links too, lies in a folder (or is it)."""
    # Unlike Path.resolve this takes links that go round.
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(os.path.join(root, ""))


def reject_external_links(places: dict[pathlib.Path, pathlib.Path]) -> None:
    """Refuses paths that lead out of the folder each must lie in.

    Who made the folder may be a stranger: nothing is read that lies elsewhere.

    Raises:
        UserError: which path it is.
    """
    for path, folder in places.items():
        if not is_within(path, folder):
            raise UserError(
                f"{path} is a link out of its folder: put what it leads to in its "
                "place, or name the folder that all of the files are in"
            )


def quote(text: str) -> str:
    """What somebody else has written, in quotes, fit for a message of one line."""
    return ascii(text[:100])


def decode_utf8(data: bytes, what: str) -> str:
    """Bytes as UTF-8 without a byte-order mark; raises SkipExample."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipExample(f"{what} is not UTF-8") from None


def clean_text(text: str | None) -> tuple[str | None, tuple[str, ...]]:
    """A text as it can be stored and shown, None if it is blank; what that took."""
    notes: tuple[str, ...] = ()
    if text and "\0" in text:
        text, notes = text.replace("\0", " "), ("noted: NUL characters in a text",)
    if text and _HALVES.search(text):
        text = _HALVES.sub("\ufffd", text)
        notes += ("noted: broken characters in a text",)
    return (text or "").strip() or None, notes


def parse_json(text: str, what: str) -> Any:
    """A JSON text as Python's types; raises SkipExample."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SkipExample(f"{what} is no valid JSON") from None


def iter_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes | None]]:
    r"""The lines of a file with their numbers from 1; None for one that is too long.

    Cut at "\n" alone, which is cut off: `str.splitlines` would also cut inside of texts
    (U+0085). A file of one endless line takes no more memory than any other.
    """
    for number, _, _, content in iter_lines_with_offsets(path):
        whole = content is not None
        yield number, content.rstrip(b"\n").rstrip(b"\r") if whole else None


def iter_lines_with_offsets(
    path: pathlib.Path,
) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Number, place, length and content of each line, as `lines` cuts them."""
    number, offset, rest = 0, 0, False
    with path.open("rb") as file:
        while piece := file.readline(MAX_LINE_BYTES + 1):
            whole = piece.endswith(b"\n")
            if not rest:
                number += 1
                rest = not whole and len(piece) > MAX_LINE_BYTES
                yield number, offset, len(piece), None if rest else piece
            else:  # of a line that was too long
                rest = not whole
            offset += len(piece)
