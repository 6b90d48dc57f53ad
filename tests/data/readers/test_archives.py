"""Archives: what is unpacked, what is left out, and what is refused."""

import io
import os
import pathlib
import random
import stat
import tarfile
import zipfile

import pytest

from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers.base import Counts
from ccu_jax.errors import UserError

FILES = {
    "pairs.jsonl": b'{"id": "a"}\n',
    "images/a.png": bytes(range(256)) * 40,
    "images/empty.png": b"",
    "images/\u00e9t\u00e9.png": b"1",
    "deep/er/b.txt": b"2" * 1024,
}
MEMBERS = tuple(FILES.items())
KINDS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]


def zipped(path, members=MEMBERS):
    """A zip; a member is a name or a ZipInfo, and its bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return path


def tarred(path, members=MEMBERS, mode="w", **more):
    """A tar; a member is a name or a TarInfo, and its bytes."""
    with tarfile.open(path, mode, **more) as opened:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def packed(path, kind):
    """An archive of FILES."""
    if kind == "zip":
        return zipped(path)
    return tarred(path, mode="w:" + kind.partition("tar.")[2])


def special(name, type_, target=""):
    """A member of a tar that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info


def zip_special(name, mode):
    """A member of a zip that is no plain file."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    return info


def content(folder):
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


@pytest.fixture
def unpack(tmp_path):
    """A function that unpacks and gives the folder's files and the counts."""

    def run(path, strict=False, told=None):
        counts = Counts("data.zip", strict)
        folder = tmp_path / "out" / "data"
        tell = (lambda *stage: told.append(stage)) if told is not None else quiet
        assert archive.unpack(path, folder, counts, tell) == folder
        return content(folder), counts.numbers

    return run


def quiet(what, done, total):
    """A progress callback that says nothing."""


def refused(tmp_path, path, message):
    """Sees that an archive is refused and that nothing of it stays."""
    with pytest.raises(UserError, match=message) as caught:
        archive.unpack(path, tmp_path / "out" / "data", Counts("d", False), quiet)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_archive_is_known_by_its_content(tmp_path, unpack, kind):
    path = packed(tmp_path / "name.that.says.nothing", kind)
    assert archive.is_archive(path)
    told = []
    files, counts = unpack(path, told=told)
    assert files == FILES and counts == {}
    size = path.stat().st_size
    assert told[-1] == ("unpacking name.that.says.nothing", size, size)
    done = [stage[1] for stage in told]
    assert done == sorted(done) and len(done) > len(FILES) // 2


@pytest.mark.parametrize("form", ["GNU_FORMAT", "PAX_FORMAT", "USTAR_FORMAT"])
def test_every_form_of_tar_is_read_with_its_long_names(tmp_path, unpack, form):
    name = "a" * 90 + "/" + "b" * 99
    path = tarred(
        tmp_path / "x", [(name, b"1"), ("c", b"2")], format=getattr(tarfile, form)
    )
    assert unpack(path)[0] == {name: b"1", "c": b"2"}


def test_what_is_no_archive_is_not_taken_for_one(tmp_path):
    for name, data in {
        "empty": b"",
        "text": b"PK is not enough\n" * 99,
        "zeros": bytes(4096),
        "json.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    import gzip

    (tmp_path / "json.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 99))
    for name in ("empty", "text", "zeros", "json.gz", "missing", "."):
        assert not archive.is_archive(tmp_path / name)
    with pytest.raises(UserError, match="text is no zip or tar archive"):
        archive.unpack(tmp_path / "text", tmp_path / "out", Counts("d", False), quiet)


def test_rights_and_owners_are_not_taken_over(tmp_path, unpack):
    info = tarfile.TarInfo("run.sh")
    info.mode, info.uid, info.mtime = 0o6777, 12345, 0
    closed = special("closed", tarfile.DIRTYPE)
    closed.mode = 0
    unpack(tarred(tmp_path / "x", [(closed, b""), (info, b"1"), ("closed/a", b"2")]))
    status = (tmp_path / "out" / "data" / "run.sh").stat()
    assert stat.S_IMODE(status.st_mode) & 0o7133 == 0
    assert status.st_uid == os.getuid() and status.st_mtime > 1e9
    assert (tmp_path / "out" / "data" / "closed" / "a").read_bytes() == b"2"


OUTSIDE = ["../a", "b/../../a", "/etc/a", "C:\\a", "c:a", "..\\a", "\\a", "b/.."]
ODD = ["x" * 300, "d/" * 200 + "a", "/".join(["y" * 250] * 9)]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_outside_of_the_folder_are_left_out_and_counted(tmp_path, unpack, kind):
    members = [("in", b"1"), *((name, b"bad") for name in OUTSIDE + ODD)]
    make = zipped if kind == "zip" else tarred
    files, counts = unpack(make(tmp_path / "x", members))
    assert files == {"in": b"1"}
    assert counts == {
        "skipped: archive member outside of the folder": len(OUTSIDE),
        "skipped: archive member has an impossible name": len(ODD),
    }
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x", "out"} and not pathlib.Path("/etc/a").exists()


def test_names_that_no_file_can_have_are_left_out(tmp_path, unpack):
    nul = tarfile.TarInfo("x")
    nul.pax_headers = {"path": "a\0b"}
    bytes_ = tarfile.TarInfo("\udcff")
    path = tarred(tmp_path / "x", [(nul, b""), (bytes_, b""), ("./", b""), ("c", b"1")])
    files, counts = unpack(path)
    assert files == {"c": b"1"}
    assert counts == {"skipped: archive member has an impossible name": 3}


def test_links_devices_and_pipes_are_left_out_and_counted(tmp_path, unpack):
    (tmp_path / "secret").write_bytes(b"secret")
    kinds = [
        special("link", tarfile.SYMTYPE, "../../secret"),
        special("here", tarfile.SYMTYPE, "in"),
        special("dir", tarfile.SYMTYPE, str(tmp_path)),
        special("hard", tarfile.LNKTYPE, "../../secret"),
        special("same", tarfile.LNKTYPE, "in"),
        special("pipe", tarfile.FIFOTYPE),
        special("null", tarfile.CHRTYPE),
        special("disk", tarfile.BLKTYPE),
        special("odd", b"Z"),
    ]
    members = [("in", b"1"), *((info, b"") for info in kinds), ("dir/new", b"2")]
    files, counts = unpack(tarred(tmp_path / "x", members))
    assert files == {"in": b"1", "dir/new": b"2"}
    assert counts == {"skipped: archive member is no plain file": len(kinds)}
    assert not (tmp_path / "new").exists()


def test_links_and_pipes_of_a_zip_are_left_out_and_counted(tmp_path, unpack):
    link, pipe = zip_special("l", stat.S_IFLNK), zip_special("p", stat.S_IFIFO)
    members = [(link, b"/etc/passwd"), (pipe, b""), ("in", b"1")]
    files, counts = unpack(zipped(tmp_path / "x", members))
    assert files == {"in": b"1"}
    assert counts == {"skipped: archive member is no plain file": 2}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_first_of_two_members_of_one_name_stays(tmp_path, unpack, kind):
    members = [
        ("a", b"1"),
        ("a", b"22"),
        ("./a", b"3"),
        ("d/", b""),
        ("d/", b""),
        ("d/e", b"4"),
        ("d", b"a file of a folder's name"),
        ("a/b", b"below a file"),
    ]
    if kind == "tar":  # there, the slash does not make a folder
        members[3:5] = [(special("d", tarfile.DIRTYPE), b"")] * 2
    make = zipped if kind == "zip" else tarred
    files, counts = unpack(make(tmp_path / "x", members))
    assert files == {"a": b"1", "d/e": b"4"}
    assert counts == {"skipped: archive member repeated": 4}


def test_what_macos_adds_is_ignored(tmp_path, unpack):
    members = [
        ("__MACOSX/", b""),
        ("__MACOSX/data/._a", b"x"),
        ("data/._a", b"x"),
        ("data/.DS_Store", b"x"),
        ("data/a", b"1"),
    ]
    files, counts = unpack(zipped(tmp_path / "x", members))
    assert files == {"data/a": b"1"} and counts == {"ignored: __MACOSX member": 3}


def test_backslashes_of_windows_are_slashes(tmp_path, unpack):
    members = [("images\\", b""), ("images\\a.png", b"1")]
    assert unpack(zipped(tmp_path / "x", members))[0] == {"images/a.png": b"1"}


def test_strict_refuses_what_would_be_left_out(tmp_path, unpack):
    path = zipped(tmp_path / "x", [("../a", b"1")])
    with pytest.raises(UserError, match=r"'\.\./a': archive member outside of the fol"):
        unpack(path, strict=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_archive_is_refused_wherever_it_is_torn(tmp_path, kind):
    whole = packed(tmp_path / "whole", kind).read_bytes()
    end = len(whole)
    if kind == "tar":  # behind the mark of its end there are only zeros
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "torn"
    for size in (*range(520, end, max(1, end // 40)), end - 1):
        path.write_bytes(whole[:size])
        assert archive.is_archive(path)
        refused(tmp_path, path, "is damaged .*fetch or copy it again")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_never_do_more_than_be_refused(tmp_path, kind):
    whole, chance = packed(tmp_path / "whole", kind).read_bytes(), random.Random(1)
    path, refusals = tmp_path / "broken", 0
    for number in range(60):
        data = bytearray(whole)
        for _ in range(1 + number % 4):
            place = chance.randrange(len(data))
            data[place] = chance.randrange(256)
        path.write_bytes(data)
        folder = tmp_path / f"out{number}"
        try:
            archive.unpack(path, folder, Counts("d", False), quiet)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and not folder.exists()
    assert refusals > (0 if kind == "tar" else 20)
    assert not list(tmp_path.glob("*.new"))


def test_wrong_content_of_a_zip_is_noticed_by_its_checksum(tmp_path):
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a", b"content" * 99)
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT", 1))
    refused(tmp_path, path, "damaged .*CRC")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archive, "MIN_LIMIT_BYTES", 1 << 20)
    members = [("a", b"1"), ("zeros", bytes(8 << 20))]
    if kind == "zip":
        path = zipped(tmp_path / "x", members)
    else:
        path = tarred(tmp_path / "x", members, mode="w:" + kind[4:])
    refused(tmp_path, path, "unpacks to more than .*bomb.*unpack it yourself")


def test_a_bomb_of_empty_files_or_of_a_long_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MIN_LIMIT_BYTES", 1 << 20)
    names = [(f"{number}", b"") for number in range(3000)]
    refused(tmp_path, tarred(tmp_path / "x", names, mode="w:xz"), "unpacks to more")
    long = tarfile.TarInfo("x")
    long.pax_headers = {"comment": "x" * (2 << 20)}
    refused(tmp_path, tarred(tmp_path / "y", [(long, b"")]), "header is too long")


def test_a_bomb_that_hides_in_what_is_left_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MIN_LIMIT_BYTES", 1 << 20)
    members = [("../zeros", bytes(8 << 20)), ("a", b"1")]
    path = tarred(tmp_path / "x", members, mode="w:gz")
    refused(tmp_path, path, "unpacks to more than")


def test_a_disk_too_small_is_told_before_it_is_full(tmp_path, monkeypatch):
    usage = (10 << 30, 0, archive.SPARE_BYTES + 5000)
    monkeypatch.setattr(
        archive.shutil, "disk_usage", lambda _: type("", (), {"free": usage[2]})
    )
    path = packed(tmp_path / "x", "zip")
    refused(tmp_path, path, "more than the 5,000 bytes .*free some")


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    path = packed(tmp_path / "x", "tar.gz")
    monkeypatch.setattr(archive.os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        archive.unpack(path, tmp_path / "out" / "d", Counts("d", False), quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_encrypted_zip_names_the_remedy(tmp_path):
    data = bytearray(packed(tmp_path / "x", "zip").read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path, tmp_path / "x", "is encrypted or compressed .* another program")


def test_a_zip_by_a_method_that_python_lacks_names_the_remedy(tmp_path):
    data = bytearray(packed(tmp_path / "x", "zip").read_bytes())
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + place] = 9
    (tmp_path / "x").write_bytes(data)
    refused(tmp_path, tmp_path / "x", "is encrypted or compressed .* another program")


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path, unpack):
    left = tmp_path / "out" / "data.new"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    assert unpack(packed(tmp_path / "x", "zip"))[0] == FILES


def test_what_was_unpacked_before_is_told_again_and_left_as_it_is(tmp_path, unpack):
    path = zipped(tmp_path / "x", [("../a", b"1"), ("b", b"2")])
    first, told = unpack(path), []
    path.write_bytes(b"gone")
    assert unpack(path, told=told) == first and not told
    with pytest.raises(UserError, match="archive member outside of the folder"):
        unpack(path, strict=True)
