"""Archives: what is unpacked, what is skipped, and what is an error."""

import gzip
import io
import os
import pathlib
import stat
import tarfile
import zipfile
from typing import Any

import pytest

from ccu_jax.data.readers import archives
from ccu_jax.data.readers.base import Counts
from ccu_jax.errors import UserError
from tests.data.readers.layouts import ignore_progress

FILES = {
    "pairs.jsonl": b'{"id": "a"}\n',
    "images/a.png": bytes(range(256)) * 40,
    "images/empty.png": b"",
    "images/\u00e9t\u00e9.png": b"1",
    "deep/er/b.txt": b"2" * 1024,
}
MEMBERS = tuple(FILES.items())
TYPES = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]


def write_tar(path, members, mode: Any = "w", **options: Any):
    with tarfile.open(path, mode, **options) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_archive(path, type_, members=MEMBERS):
    """Writes members; each is a name, TarInfo or ZipInfo, and the bytes."""
    if type_ != "zip":
        return write_tar(path, members, "w:" + type_.partition("tar.")[2])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def tar_info(name, type_=tarfile.REGTYPE, target="", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zip_info(name, mode):
    """A member of a zip that is no regular file."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    return info


@pytest.fixture
def unpack(tmp_path):
    """Unpacks an archive; returns the files of its folder, and the counts."""

    def run(path, strict=False, progress=ignore_progress):
        counts = Counts("data.zip", strict)
        folder = tmp_path / "out" / "data"
        assert archives.unpack(path, folder, counts, progress) == folder
        files = [file for file in folder.rglob("*") if not file.is_dir()]
        contents = {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}
        return contents, counts.numbers

    return run


@pytest.fixture
def assert_error(tmp_path, unpack):
    """Checks that an archive is an error, and that nothing of it remains."""

    def check(path, message):
        with pytest.raises(UserError, match=message) as error:
            unpack(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert list((tmp_path / "out").iterdir()) == []

    return check


@pytest.mark.parametrize("type_", TYPES)
def test_type_of_an_archive_is_found_by_its_content(tmp_path, unpack, type_):
    path = write_archive(tmp_path / "archive", type_)
    calls = []
    files, counts = unpack(path, progress=lambda *call: calls.append(call))
    assert files == FILES
    assert counts == {}
    size = path.stat().st_size
    assert calls[-1] == ("unpacking archive", size, size)
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert len(done) > len(FILES) // 2


@pytest.mark.parametrize("format_", [0, 1, 2], ids=["ustar", "gnu", "pax"])
def test_long_names_of_tars_are_read(tmp_path, unpack, format_):
    members = {"a" * 90 + "/" + "b" * 99: b"1", "c": b"2"}
    path = write_tar(tmp_path / "x", members.items(), format=format_)
    assert unpack(path)[0] == members


def test_other_files_are_no_archives(tmp_path, unpack):
    for name, data in {
        "empty": b"",
        "text": b"PK is not enough\n" * 99,
        "zeros": bytes(4096),
        "json.gz": gzip.compress(b'{"id": 1}\n' * 99),
    }.items():
        (tmp_path / name).write_bytes(data)
        message = f"{name} is not a folder, zip or tar archive"
        with pytest.raises(UserError, match=message):
            unpack(tmp_path / name)


def test_permissions_and_owners_are_those_of_new_files(tmp_path, unpack):
    members = [
        (tar_info("closed", tarfile.DIRTYPE, mode=0), b""),
        (tar_info("run.sh", mode=0o6777, uid=12345, mtime=0), b"1"),
        ("closed/a", b"2"),
    ]
    files, _ = unpack(write_tar(tmp_path / "x", members))
    assert files == {"run.sh": b"1", "closed/a": b"2"}
    status = (tmp_path / "out" / "data" / "run.sh").stat()
    assert stat.S_IMODE(status.st_mode) & 0o7133 == 0
    assert status.st_uid == os.getuid()
    assert status.st_mtime > 1e9


def test_unpacked_folder_is_kept_and_its_counts_are_repeated(tmp_path, unpack):
    (tmp_path / "out" / "data.new").mkdir(parents=True)  # left by a killed run
    (tmp_path / "out" / "data.new" / "half").write_bytes(b"x")
    path = write_archive(tmp_path / "x", "zip", [("../a", b"1"), ("b", b"2")])
    with pytest.raises(UserError, match=r"'\.\./a': archive member outside of the fol"):
        unpack(path, strict=True)
    assert list((tmp_path / "out").iterdir()) == []
    expected, calls = unpack(path), []
    assert expected[0] == {"b": b"2"}
    path.write_bytes(b"other")
    assert unpack(path, progress=lambda *call: calls.append(call)) == expected
    assert not calls
    with pytest.raises(UserError, match="archive member outside of the folder"):
        unpack(path, strict=True)


OUTSIDE = ["../a", "b/../../a", "/etc/a", "C:\\a", "c:a", "..\\a", "\\a", "b/.."]
LONG_NAMES = ["x" * 300, "d/" * 200 + "a", "/".join(["y" * 250] * 9)]
BAD_NAMES = [tar_info("x", pax_headers={"path": "a\0b"}), tar_info("\udcff"), "./"]
LINKS = {"link": "../../secret", "here": "in", "dir": ".."}
SPECIAL_TYPES = (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"Z")
SPECIAL_FILES = {
    "zip": [zip_info("link", stat.S_IFLNK), zip_info("pipe", stat.S_IFIFO)],
    "tar": [
        *(tar_info(name, tarfile.SYMTYPE, target) for name, target in LINKS.items()),
        *(tar_info("hard" + name, tarfile.LNKTYPE, LINKS[name]) for name in LINKS),
        *(tar_info(f"special {type_}", type_) for type_ in SPECIAL_TYPES),
    ],
}
HOSTILE_MEMBERS = [
    ("outside of the folder", dict.fromkeys(("zip", "tar"), OUTSIDE)),
    ("has an impossible name", {"zip": LONG_NAMES, "tar": LONG_NAMES + BAD_NAMES}),
    ("is no plain file", SPECIAL_FILES),
]


@pytest.mark.parametrize("type_", ["zip", "tar"])
@pytest.mark.parametrize("reason, members", HOSTILE_MEMBERS)
def test_hostile_member_is_skipped(tmp_path, unpack, type_, reason, members):
    members = members[type_]
    (tmp_path / "secret").write_bytes(b"secret")
    new = [("in", b"1"), *((name, b"") for name in members), ("dir/new", b"2")]
    files, counts = unpack(write_archive(tmp_path / "x", type_, new))
    assert files == {"in": b"1", "dir/new": b"2"}
    assert counts == {f"skipped: archive member {reason}": len(members)}
    assert {path.name for path in tmp_path.iterdir()} == {"x", "out", "secret"}
    assert not pathlib.Path("/etc/a").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("type_", ["zip", "tar"])
def test_repeated_and_macos_members_are_left_out(tmp_path, unpack, type_):
    folder, macos = "d/", "__MACOSX/"
    if type_ == "tar":
        folder, macos = (tar_info(n, tarfile.DIRTYPE) for n in ("d", "__MACOSX"))
    members = [
        ("a", b"1"),
        ("a", b"22"),
        ("./a", b"3"),
        (folder, b""),
        (folder, b""),
        ("d/e", b"4"),
        ("d", b"a file with the name of a folder"),
        ("a/b", b"below a file"),
        ("images\\c.png", b"5"),  # some programs on Windows write backslashes
        (macos, b""),
        *((name, b"6") for name in ("__MACOSX/d/._a", "d/._a", "d/.DS_Store")),
    ]
    files, counts = unpack(write_archive(tmp_path / "x", type_, members))
    assert files == {"a": b"1", "d/e": b"4", "images/c.png": b"5"}
    repeated, ignored = "skipped: archive member repeated", "ignored: __MACOSX member"
    assert counts == {repeated: 4, ignored: 3}


@pytest.mark.parametrize("type_", TYPES)
def test_truncated_archive_is_an_error(tmp_path, assert_error, type_):
    data = write_archive(tmp_path / "complete", type_).read_bytes()
    end = len(data)
    if type_ == "tar":  # only zeros follow the mark of its end
        end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "truncated"
    for size in (*range(520, end, max(1, end // 40)), end - 1):
        path.write_bytes(data[:size])
        assert_error(path, "is damaged .*download or copy it again")


@pytest.mark.parametrize(
    "type_, name",
    [
        *((type_, "zeros") for type_ in ("zip", "tar.gz", "tar.bz2", "tar.xz")),
        ("tar.gz", "../zeros"),  # decompressed although it is skipped
    ],
)
def test_decompression_bomb_is_an_error(
    tmp_path, assert_error, monkeypatch, type_, name
):
    monkeypatch.setattr(archives, "MIN_LIMIT_BYTES", 1 << 20)
    members = [("a", b"1"), (name, bytes(8 << 20))]
    path = write_archive(tmp_path / "x", type_, members)
    assert_error(path, "unpacks to more than .*bomb.*unpack it yourself")


def test_bombs_of_empty_files_folders_and_headers_are_errors(
    tmp_path, assert_error, monkeypatch
):
    monkeypatch.setattr(archives, "MIN_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "MAX_RATIO", 1)
    names = [(f"{number}", b"") for number in range(3000)]
    assert_error(write_tar(tmp_path / "x", names, "w:xz"), "unpacks to more")
    names = [(f"{number}" + "/a" * 90, b"") for number in range(60)]
    assert_error(write_tar(tmp_path / "y", names, "w:xz"), "unpacks to more")
    long = tar_info("x", pax_headers={"comment": "x" * (2 << 20)})
    assert_error(write_tar(tmp_path / "z", [(long, b"")]), "header is too long")


def test_small_or_full_disk_is_an_error(tmp_path, unpack, assert_error, monkeypatch):
    def raise_full(*args, **options):
        raise OSError(28, "No space left on device")

    path = write_archive(tmp_path / "x", "tar.gz")
    usage = type("", (), {"free": archives.SPARE_BYTES + 5000})
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda _: usage)
        assert_error(path, "more than the 5,000 bytes .*free some space")
    monkeypatch.setattr(archives.os, "fdopen", raise_full)
    with pytest.raises(OSError, match="No space left"):
        unpack(path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "offsets, value, message",
    [
        ((6, 8), 1, "is encrypted or uses an .*: unpack it with another program"),
        ((8, 10), 9, "is encrypted or uses an .*: unpack it with another program"),
        ((14, 16), 9, "is damaged .*CRC"),
    ],
    ids=["encrypted", "unknown compression", "wrong checksum"],
)
def test_zip_that_cannot_be_read_is_an_error(
    tmp_path, assert_error, offsets, value, message
):
    data = bytearray(write_archive(tmp_path / "x", "zip").read_bytes())
    for magic, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), offsets, strict=True):
        data[data.index(magic) + offset] = value
    (tmp_path / "x").write_bytes(data)
    assert_error(tmp_path / "x", message)
