"""Unpacks the zip or tar archive of a data set: safely, whole or not at all.

What an archive says of itself (names, sizes, links, rights) is never believed.
"""

import bz2
import contextlib
import errno
import gzip
import json
import lzma
import os
import pathlib
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from ccu_jax.data.readers.base import Counts, Progress
from ccu_jax.data.readers.untrusted_files import quote
from ccu_jax.errors import UserError

MOST_TIMES = 200  # what is unpacked may be so many times as large as the archive
ALWAYS = 1 << 30  # bytes that may be unpacked from any archive
SPARE = 256 << 20  # bytes of the disk that are left free
_PIECE = 1 << 18  # bytes read at a time
_HEADER = 1 << 20  # bytes; Python would take the header of a tar member at any length
_LEAST = 512  # bytes that a member, or a folder it is in, counts for: it may be empty
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_METHODS = (0, 8, 12, 14)  # of zip, that Python can undo
_ENCRYPTED = 0x41  # bits of a zip member's flags
_OPENERS: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class _Member(NamedTuple):
    """A member of an archive; `open` is None where it is no plain file."""

    name: str
    folder: bool
    open: Callable[[], IO[bytes]] | None


def is_archive(path: pathlib.Path) -> bool:
    """Whether this is a file that `unpack` takes, going by what is in it."""
    return path.is_file() and _kind(path) is not None


def unpack(
    archive: pathlib.Path, folder: pathlib.Path, counts: Counts, progress: Progress
) -> pathlib.Path:
    """Unpacks a zip or tar archive (plain, or by gzip, bzip2 or xz) into a new folder.

    Members that are no plain files, that would lie outside of the folder or that come
    a second time are left out and counted. Rights and owners are not taken over.

    Args:
        archive: The file; its name does not matter.
        folder: Where its members go; it appears when all are there. If it is there, it
            was unpacked before, and is left as it is.
        counts: Told of the members that are left out.
        progress: Called with (what, done, total), bytes of the archive.

    Returns:
        `folder`.

    Raises:
        UserError: no archive, a damaged or encrypted one, or one that unpacks to more
            than MOST_TIMES its size or than the disk holds.
        OSError: the disk is full or refuses.
    """
    if folder.is_dir():
        return _told(folder, counts)
    kind, size = _kind(archive), archive.stat().st_size
    if kind is None:
        raise UserError(f"{archive} is no zip or tar archive: name one, or a folder")
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    limit = _Limit(archive, size, shutil.disk_usage(scratch).free - SPARE)
    found, what = Counts(counts.origin, counts.strict), f"unpacking {archive.name}"
    try:
        with archive.open("rb") as raw:
            members = _zipped(raw, archive) if kind == "zip" else _tarred(raw, limit)
            for _ in _written(members, scratch, limit, found):
                progress(what, min(raw.tell(), size), size)
        _left_out(folder).write_text(json.dumps(found.numbers), "utf-8")
        scratch.rename(folder)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if not _is_damage(error):
            raise
        told = quote(str(error) or type(error).__name__)[1:-1]
        raise UserError(
            f"{archive} is damaged ({told}): fetch or copy it again"
        ) from error
    progress(what, size, size)
    return _told(folder, counts)


def _left_out(folder: pathlib.Path) -> pathlib.Path:
    """Where it is written down what was left out of a folder."""
    return folder.with_name(folder.name + ".json")


def _told(folder: pathlib.Path, counts: Counts) -> pathlib.Path:
    for name, number in json.loads(_left_out(folder).read_text("utf-8")).items():
        if counts.strict and name.startswith("skipped: "):
            counts.skip(name.removeprefix("skipped: "), str(folder))
        counts.add(name, number)
    return folder


def _kind(path: pathlib.Path) -> str | None:
    """Gives "zip", "tar" or None; other compressed data are no archive."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(_ZIP):
        return "zip"
    if opener := _opener(head):
        try:
            with opener(path) as file:
                head = file.read(512)
        except Exception:
            return "tar"  # a damaged one, as unpacking will tell
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return "tar"


def _opener(head: bytes) -> Callable | None:
    return next((o for magic, o in _OPENERS.items() if head.startswith(magic)), None)


def _is_damage(error: BaseException) -> bool:
    """Whether it comes of what is in the archive.

    Python's own readers raise almost anything over hostile bytes. Errors of the system
    have a number, those of gzip and bz2 have none; EINVAL is of a seek to nowhere.
    """
    if isinstance(error, OSError):
        return error.errno in (None, errno.EINVAL)
    return isinstance(error, Exception) and not isinstance(
        error, (UserError, MemoryError)
    )


def _zipped(raw: IO[bytes], archive: pathlib.Path) -> Iterator[_Member]:
    with zipfile.ZipFile(raw) as opened:
        # In the order in which they lie there: the progress goes on, never back.
        members = sorted(opened.infolist(), key=lambda info: info.header_offset)
        if any(info.flag_bits & _ENCRYPTED for info in members):
            raise UserError(
                f"{archive} is encrypted: unpack it with its password first, and name "
                "the folder"
            )
        for info in members:
            if info.compress_type not in _METHODS:
                raise UserError(
                    f"{archive}: {quote(info.filename)} is compressed by method "
                    f"{info.compress_type}, which Python cannot undo: unpack it with "
                    "another program, and name the folder"
                )
        for info in members:
            mode, name = info.external_attr >> 16, info.orig_filename
            folder = name.endswith(("/", "\\")) or stat.S_ISDIR(mode)
            plain = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            reader = (lambda i=info: opened.open(i)) if plain else None
            yield _Member(name, folder, reader)


def _tarred(raw: IO[bytes], limit: "_Limit") -> Iterator[_Member]:
    opener = _opener(raw.read(8))
    raw.seek(0)
    with (
        opener(raw) if opener else contextlib.nullcontext(raw) as plain,
        tarfile.open(fileobj=(stream := _Guarded(plain, limit)), mode="r:") as opened,
    ):
        while (info := opened.next()) is not None:
            reader = (lambda i=info: opened.extractfile(i)) if info.isreg() else None
            yield _Member(info.name, info.isdir(), reader)
            opened.members.clear()  # it would keep them all
        # Python takes a torn or broken header for the end, too.
        if stream.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it breaks off")
        while stream.read(_PIECE):  # compressed data have a checksum at their end
            pass


class _Guarded:
    """A stream of which no more is read, and no more at once, than is safe."""

    def __init__(self, stream: IO[bytes], limit: "_Limit"):
        self._stream, self._limit = stream, limit
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError("a header is too long")
        self._limit.check(self._stream.tell())
        self.last = self._stream.read(size)
        return self.last

    def seek(self, place: int) -> None:
        # Forward in steps, for compressed data are unpacked on the way.
        while (left := place - self._stream.tell()) > 0:
            if not self.read(min(left, _PIECE)):
                return
        if left:
            self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()


class _Limit:
    """How many bytes may be unpacked."""

    def __init__(self, archive: pathlib.Path, size: int, free: int):
        self._archive, self._free = archive, max(free, 0)
        self._most = max(MOST_TIMES * size, ALWAYS)

    def check(self, total: int) -> None:
        if total > self._most:
            raise UserError(
                f"{self._archive} unpacks to more than {self._most:,} bytes, as a "
                "decompression bomb does: if you trust it, unpack it yourself and name "
                "the folder"
            )
        if total > self._free:
            raise UserError(
                f"{self._archive} unpacks to more than the {self._free:,} bytes that "
                "may be written to this disk: free some, or give another --workdir"
            )


def _written(
    members: Iterator[_Member], root: pathlib.Path, limit: _Limit, counts: Counts
) -> Iterator[None]:
    """Writes the members below `root`; comes back after every piece."""
    total = 0
    for member in members:
        folders = member.name.count("/") + member.name.count("\\")
        limit.check(total := total + _LEAST * (1 + folders))
        parts = _parts(member)
        if isinstance(parts, str):
            counts.skip(f"archive member {parts}", quote(member.name))
            continue
        if _of_macos(parts):
            counts.add("ignored: __MACOSX member", int(not member.folder))
            continue
        try:
            above = parts if member.folder else parts[:-1]
            os.makedirs(os.path.join(root, *above), 0o755, exist_ok=True)
            if member.folder:
                continue
            target = os.open(os.path.join(root, *parts), _NEW, 0o644)
        except (FileExistsError, NotADirectoryError):
            counts.skip("archive member repeated", quote(member.name))
            continue
        with os.fdopen(target, "wb") as file, member.open() as source:
            while piece := source.read(_PIECE):
                limit.check(total := total + len(piece))
                file.write(piece)
                yield


def _parts(member: _Member) -> list[str] | str:
    """The parts of a member's path, or what is wrong with the member."""
    name = member.name.replace("\\", "/")  # zips of some Windows programs have these
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
        return "outside of the folder"
    if not member.folder and member.open is None:
        return "is no plain file"
    lengths = [len(part.encode(errors="replace")) for part in parts]
    possible = (
        not re.search("[\0\ud800-\udfff]", name)
        and (parts or member.folder)
        and max(lengths, default=0) <= 255
        and sum(lengths) <= 2000
        and len(parts) <= 100
    )
    return parts if possible else "has an impossible name"


def _of_macos(parts: list[str]) -> bool:
    """Whether it is one of the files that macOS adds."""
    if not parts:
        return False
    return parts[0] == "__MACOSX" or parts[-1][:2] == "._" or parts[-1] == ".DS_Store"
