"""Generates archives with hostile members and damaged headers, for fuzzing."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import warnings
import zipfile
from random import Random
from typing import Any

from tests.fuzz.contents import Link, Tree, draw_string, maybe_mutate, mutate

_MEMBER_TYPES = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V", b"z"),
    *(tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.AREGTYPE),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME),
    tarfile.SOLARIS_XHDTYPE,
)
_FORMATS: Any = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_COMPRESSIONS = (*[zipfile.ZIP_DEFLATED] * 6, 0, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_NAMES = ("a", "a/b", "a/b/c", "a.png", "b/", "./a", "__MACOSX/a", ".DS_Store", "._a")
_PAX_KEYS = (
    *("path", "linkpath", "size", "mtime", "uid", "uname", "charset", "hdrcharset"),
    *("GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "GNU.sparse.minor"),
    *("GNU.sparse.name", "GNU.sparse.realsize", "GNU.sparse.numblocks", "comment"),
)
_DATA = (b"", b"text", bytes(1000), bytes(range(256)) * 3)
_PAX_VALUES = ("0", "1", "-1", "9" * 30, "1,2,3", "0,512", "../x")
# Values for the numeric fields of a tar header.
_NUMERIC_FIELDS = (
    *(b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"           \0"),
    *(b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 10 + b"\xfe\0", b"00000001000\0"),
    *(b"\x80" + b"\0" * 7 + b"\x7f\xff\xff\xff", b"garbage\0\0\0\0\0", b"\0" * 12),
)


def draw_archive(rng: Random) -> bytes:
    """Returns a zip or tar archive, sometimes damaged."""
    if rng.random() < 0.45:
        return _draw_zip(rng)
    data, roll = _draw_tar(rng), rng.random()
    if roll < 0.5:
        return maybe_mutate(rng, data, 0.1)
    if roll < 0.85:
        packed = gzip.compress(data, 1, mtime=0)
    elif roll < 0.95:
        packed = bz2.compress(data, 1)
    else:
        packed = lzma.compress(data, preset=0)
    return maybe_mutate(rng, packed, 0.3)


def pack_tree(rng: Random, tree: Tree) -> bytes:
    """Returns a compressed tar of files and links, sometimes damaged."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for path, node in tree.items():
            info = tarfile.TarInfo(path)
            if isinstance(node, bytes):
                info.size = len(node)
                archive.addfile(info, io.BytesIO(node))
            elif isinstance(node, Link):
                info.type, info.linkname = tarfile.SYMTYPE, node.target
                archive.addfile(info)
    return maybe_mutate(rng, out.getvalue(), 0.2)


def _draw_name(rng: Random) -> str:
    return rng.choice(_NAMES) if rng.random() < 0.6 else draw_string(rng)


def _draw_zip(rng: Random) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for _ in range(rng.randrange(4)):
            name = _draw_name(rng).encode("utf-8", "replace").decode()
            info = zipfile.ZipInfo("a")
            info.filename = info.orig_filename = name  # including NUL
            info.compress_type = rng.choice(_COMPRESSIONS)
            if rng.random() < 0.2:
                modes = (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFREG, 0xF000)
                info.external_attr = (rng.choice(modes) | 0o777) << 16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about repeated names
                archive.writestr(info, rng.choice(_DATA))
    data = bytearray(file.getvalue())
    while rng.random() < 0.5:
        at = data.rfind(rng.choice((b"PK\1\2", b"PK\3\4", b"PK\5\6")))
        field = max(at, 0) + rng.randrange(4, 46)
        width = rng.choice((1, 2, 4))
        value = rng.choice((0, 1, 8, 9, 20, 63, 127, 255, 65535, 2**31, 2**32 - 1))
        data[field : field + width] = (value % 256**width).to_bytes(width, "little")
    return maybe_mutate(rng, bytes(data), 0.15)


def _draw_tar(rng: Random) -> bytes:
    out = bytearray()
    format_ = rng.choice(_FORMATS)
    for _ in range(rng.randrange(4)):
        info, data = tarfile.TarInfo(_draw_name(rng)), rng.choice(_DATA)
        if rng.random() < 0.3:
            info.type, info.linkname = rng.choice(_MEMBER_TYPES), draw_string(rng)
        if rng.random() < 0.15:
            data = _draw_pax_records(rng)
        info.size = len(data)
        if format_ == tarfile.PAX_FORMAT and rng.random() < 0.4:
            keys = rng.sample(_PAX_KEYS, rng.randint(1, 4))
            values = (*_PAX_VALUES, draw_string(rng))
            info.pax_headers = {key: rng.choice(values) for key in keys}
        try:
            out += info.tobuf(format_)
        except (ValueError, UnicodeError):  # a name that cannot be written
            continue
        out += data + bytes(-len(data) % tarfile.BLOCKSIZE)
    out += bytes(tarfile.BLOCKSIZE * rng.choice((0, 1, 2, 2, 2, 20)))
    blocks = range(0, len(out), tarfile.BLOCKSIZE)
    headers = [at for at in blocks if out[at + 257 : at + 262] == b"ustar"]
    while headers and rng.random() < 0.4:
        at = rng.choice(headers)
        if rng.random() < 0.6:
            place, width = rng.choice(((124, 12), (136, 12), (483, 12), (386, 12)))
            out[at + place : at + place + width] = rng.choice(_NUMERIC_FIELDS)
        else:
            end = at + tarfile.BLOCKSIZE
            out[at:end] = mutate(rng, bytes(out[at:end]))[:512].ljust(512, b"\0")
        if rng.random() < 0.85:
            _fix_checksum(out, at)
    return bytes(out)


def _draw_pax_records(rng: Random) -> bytes:
    """Returns pax header records, some with a wrong length."""
    records = b""
    for _ in range(rng.randint(1, 3)):
        text = f" {rng.choice(_PAX_KEYS)}={draw_string(rng)[:200]}\n"
        record = text.encode("utf-8", "replace")
        length = rng.choice((len(record) + 2, len(record) + 3, 0, 1, 3, 10**6, -5))
        records += str(length).encode() + record
    return records


def _fix_checksum(out: bytearray, at: int) -> None:
    """Corrects the checksum of the tar header at offset `at`."""
    header = bytes(out[at : at + 148]) + b" " * 8 + bytes(out[at + 156 : at + 512])
    out[at + 148 : at + 156] = b"%06o\0 " % sum(header)
