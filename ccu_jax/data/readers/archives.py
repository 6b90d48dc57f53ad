"""Unpacks the zip or tar archive of a data set: completely or not at all.

Names, sizes, links and permissions in an archive are not trusted.
"""

import bz2
import contextlib
import errno
import functools
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
from typing import IO, NamedTuple, cast

from ccu_jax.data.readers.base import Counts, Progress
from ccu_jax.data.readers.untrusted_files import quote
from ccu_jax.errors import UserError

MAX_RATIO = 200  # of the unpacked bytes to those of the archive
MIN_LIMIT_BYTES = 1 << 30  # an archive of any size may unpack to this many
SPARE_BYTES = 256 << 20  # left free on the disk
_PIECE_BYTES = 1 << 18  # read at a time
_MAX_HEADER_BYTES = 1 << 20  # of a tar member; tarfile would read any length at once
_ENTRY_BYTES = 512  # added for each file and folder, so that empty ones count
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_DECOMPRESSORS: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_Open = Callable[[], IO[bytes]]


class _Member(NamedTuple):
    """A member of a zip or tar archive."""

    name: str
    is_folder: bool
    open: _Open | None  # None unless it is a regular file


def unpack(
    archive: pathlib.Path, folder: pathlib.Path, counts: Counts, progress: Progress
) -> pathlib.Path:
    """Unpacks a zip or tar archive (plain, gzip, bzip2 or xz) and returns the folder.

    Links, devices, repeated names and paths that lead out of the folder are skipped and
    counted. Files get default permissions and the current owner.

    The folder is renamed into place after all members are written, so an existing
    folder is complete and reused. `progress` reports bytes of the archive.

    Raises:
        UserError: the file is not an archive, is damaged or encrypted, or unpacks to
            more than MAX_RATIO times its size or more than the free disk space.
        OSError: the disk is full or fails.
    """
    if folder.is_dir():
        _restore_counts(folder, counts)
        return folder
    type_, size = _detect_type(archive), archive.stat().st_size
    if type_ is None:
        raise UserError(
            f"data.dir: {archive} is not a folder, zip or tar archive; correct it"
        )
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
    scratch.mkdir(parents=True)
    limit = _Limit(archive, shutil.disk_usage(scratch).free - SPARE_BYTES)
    skipped, stage = Counts(counts.origin, counts.strict), f"unpacking {archive.name}"
    try:
        with archive.open("rb") as raw:
            is_zip = type_ == "zip"
            members = (
                _iter_zip_members(raw) if is_zip else _iter_tar_members(raw, limit)
            )
            for _ in _write_members(members, scratch, limit, skipped):
                progress(stage, min(raw.tell(), size), size)
        _get_counts_path(folder).write_text(json.dumps(skipped.numbers), "utf-8")
        scratch.rename(folder)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise _translate_error(archive, error) or error from error
    progress(stage, size, size)
    _restore_counts(folder, counts)
    return folder


def _translate_error(archive: pathlib.Path, error: BaseException) -> UserError | None:
    """Returns a UserError if the archive caused the error, otherwise None."""
    # Python's own readers raise almost any exception for hostile bytes. An OSError of
    # the system has a number; those of gzip and bz2 have none, and a seek to a wrong
    # position gives EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return None
    if not isinstance(error, Exception) or isinstance(error, UserError | MemoryError):
        return None
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        return UserError(
            f"{archive} is encrypted or uses an unsupported compression method: unpack "
            "it with another program, and set data.dir to the folder"
        )
    cause = quote(str(error) or type(error).__name__)[1:-1]
    return UserError(f"{archive} is damaged ({cause}): download or copy it again")


def _get_counts_path(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + ".json")


def _restore_counts(folder: pathlib.Path, counts: Counts) -> None:
    """Adds the counts stored when `folder` was unpacked to `counts`."""
    stored = json.loads(_get_counts_path(folder).read_text("utf-8"))
    for name, number in stored.items():
        if counts.strict and name.startswith("skipped: "):
            counts.skip(name.removeprefix("skipped: "), str(folder))
        counts.add(name, number)


def _detect_type(path: pathlib.Path) -> str | None:
    """Returns "zip", "tar" (also compressed), or None if it is not an archive."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    if decompress := _find_decompressor(head):
        try:
            with decompress(path) as file:
                head = file.read(512)
        except Exception:
            return "tar"  # damaged, as unpacking will report
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return "tar"


def _find_decompressor(head: bytes) -> Callable | None:
    """Returns the function that opens compressed data, or None, by magic number."""
    matches = (f for magic, f in _DECOMPRESSORS.items() if head.startswith(magic))
    return next(matches, None)


def _iter_zip_members(raw: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(raw) as opened:
        # Sorted by file offset, so that the reported progress never decreases.
        for info in sorted(opened.infolist(), key=lambda info: info.header_offset):
            mode, name = info.external_attr >> 16, info.orig_filename
            is_folder = name.endswith(("/", "\\")) or stat.S_ISDIR(mode)
            is_file = stat.S_IFMT(mode) in (0, stat.S_IFREG)
            reader = functools.partial(opened.open, info)
            yield _Member(name, is_folder, reader if is_file else None)


def _iter_tar_members(raw: IO[bytes], limit: "_Limit") -> Iterator[_Member]:
    decompress = _find_decompressor(raw.read(8))
    raw.seek(0)
    with decompress(raw) if decompress else contextlib.nullcontext(raw) as plain:
        stream = _LimitedStream(plain, limit)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as opened:
            while (info := opened.next()) is not None:
                reader = cast(_Open, functools.partial(opened.extractfile, info))
                yield _Member(info.name, info.isdir(), reader if info.isreg() else None)
                # tarfile would keep all members in memory.
                vars(opened)["members"].clear()
        # tarfile treats a truncated or invalid header as the end of the archive.
        if stream.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of file")
        while stream.read(_PIECE_BYTES):  # up to the checksum of compressed data
            pass


class _LimitedStream:
    """A file object for tarfile that limits the size of each read and their total."""

    def __init__(self, stream: IO[bytes], limit: "_Limit"):
        self._stream, self._limit = stream, limit
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        self._limit.check(self._stream.tell())
        self.last = self._stream.read(size)
        return self.last

    def seek(self, offset: int) -> None:
        # Seek forward by reading, so that the size limit is checked on the way.
        while (left := offset - self._stream.tell()) > 0:
            if not self.read(min(left, _PIECE_BYTES)):
                return
        if left:
            self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()


class _Limit:
    """The limit on the total unpacked bytes of an archive."""

    def __init__(self, archive: pathlib.Path, free: int):
        self._archive, self._free = archive, max(free, 0)
        self._max_bytes = max(MAX_RATIO * archive.stat().st_size, MIN_LIMIT_BYTES)

    def check(self, total: int) -> None:
        """Raises UserError if `total` unpacked bytes exceed the limit."""
        if total > self._max_bytes:
            raise UserError(
                f"{self._archive} unpacks to more than {self._max_bytes:,} bytes and "
                "may be a decompression bomb: if you trust it, unpack it yourself and "
                "set data.dir to the folder"
            )
        if total > self._free:
            raise UserError(
                f"{self._archive} unpacks to more than the {self._free:,} bytes that "
                "are free on this disk: free some space, or pass another --workdir"
            )


def _write_members(
    members: Iterator[_Member], root: pathlib.Path, limit: _Limit, counts: Counts
) -> Iterator[None]:
    """Writes the members below `root`; yields after each block, to report progress."""
    total = 0
    for member in members:
        num_folders = member.name.count("/") + member.name.count("\\")
        limit.check(total := total + _ENTRY_BYTES * (1 + num_folders))
        parts, defect = _split_path(member)
        if defect:
            counts.skip(f"archive member {defect}", quote(member.name))
            continue
        if _is_macos_metadata(parts):
            counts.add("ignored: __MACOSX member", int(not member.is_folder))
            continue
        try:
            folders = parts if member.is_folder else parts[:-1]
            os.makedirs(os.path.join(root, *folders), 0o755, exist_ok=True)
            if member.is_folder or member.open is None:
                continue
            target = os.open(os.path.join(root, *parts), _NEW_FILE, 0o644)
        except (FileExistsError, NotADirectoryError):
            counts.skip("archive member repeated", quote(member.name))
            continue
        with os.fdopen(target, "wb") as file, member.open() as source:
            while piece := source.read(_PIECE_BYTES):
                limit.check(total := total + len(piece))
                file.write(piece)
                yield


def _split_path(member: _Member) -> tuple[list[str], str]:
    """Returns the parts of a member's path, and the reason to skip it or "".

    Stricter than `tarfile.data_filter`, which keeps links and absolute paths.
    """
    name = member.name.replace("\\", "/")  # some programs on Windows write these
    parts = [part for part in name.split("/") if part not in ("", ".")]
    lengths = [len(part.encode(errors="replace")) for part in parts]
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
        return parts, "outside of the folder"
    if not member.is_folder and member.open is None:
        return parts, "is no plain file"
    if (
        re.search("[\0\ud800-\udfff]", name)
        or not (parts or member.is_folder)
        or max(lengths, default=0) > 255
        or sum(lengths) > 2000
        or len(parts) > 100
    ):
        return parts, "has an impossible name"
    return parts, ""


def _is_macos_metadata(parts: list[str]) -> bool:
    first, last = (parts[0], parts[-1]) if parts else ("", "")
    return first == "__MACOSX" or last == ".DS_Store" or last.startswith("._")
