"""Purging: no piece of a forgotten picture is left in what the run keeps."""

import io
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import forget, load, load_prepared
from ccu_jax.data.preparation import prepare, purge
from ccu_jax.data.preparation.purge import needle
from ccu_jax.errors import UserError


def quiet(what, done, total):
    """A progress callback that says nothing."""


def grain(seed, size=(40, 30), kind="JPEG"):
    """An encoded picture that is like no other."""
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    image = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


# --- the search -----------------------------------------------------------------------


@pytest.fixture
def haystack(tmp_path, monkeypatch):
    monkeypatch.setattr(purge, "_CHUNK", 1000)
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for name in ("a.bin", "below/b.bin", "empty"):
        size = 0 if name == "empty" else 5000
        (tmp_path / name).write_bytes(rng.integers(0, 256, size, np.uint8).tobytes())
    return tmp_path


@pytest.mark.parametrize("place", [0, 1, 968, 969, 985, 999, 1000, 2345, 4968])
def test_a_piece_is_found_wherever_it_lies(haystack, place):
    data = (haystack / "below" / "b.bin").read_bytes()
    wanted = needle("row", "square", data[place : place + purge.PIECE])
    assert purge.search([wanted], [haystack], quiet) == {
        "needles": 1,
        "files": 3,
        "bytes": 10_000,
        "hits": [("row", str(haystack / "below" / "b.bin"))],
    }


def test_what_is_not_there_is_not_found(haystack):
    data = (haystack / "a.bin").read_bytes()
    near = bytearray(data[100 : 100 + purge.PIECE])
    near[-1] ^= 1  # the same but for one bit
    other = np.random.default_rng(9).integers(0, 256, 32, np.uint8).tobytes()
    needles = [needle("near", "square", bytes(near)), needle("other", "square", other)]
    assert purge.search(needles, [haystack], quiet)["hits"] == []
    assert purge.search([], [haystack], quiet)["hits"] == []


def test_two_rows_with_one_picture_are_both_named_once(haystack):
    data = (haystack / "a.bin").read_bytes()
    wanted = [
        needle(i, "square", data[p : p + purge.PIECE]) for i in "xy" for p in (5, 300)
    ]
    found = purge.search(wanted, [haystack], quiet)
    assert found["hits"] == [(i, str(haystack / "a.bin")) for i in "xy"]


def test_links_are_not_followed(haystack, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "c.bin"
    outside.write_bytes(grain(0))
    (haystack / "link").symlink_to(outside)
    needles = [needle("row", "original", p) for p in purge.pieces(grain(0))]
    assert purge.search(needles, [haystack], quiet)["hits"] == []


def test_pieces_are_telling_and_even_pictures_have_none():
    assert len(purge.pieces(grain(0))) == 3
    assert purge.pieces(bytes(5000)) == [] and purge.pieces(b"short") == []
    for piece in purge.pieces(bytes(2000) + grain(1) + bytes(2000)):
        assert len(piece) == purge.PIECE and len(set(piece)) >= 12


# --- the whole ------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A user's folder with 30 pictures, and its configuration."""
    root = tmp_path / "own"
    root.mkdir()
    lines = ["image,text,label"]
    for n in range(30):
        (root / f"{n}.jpg").write_bytes(grain(n))
        lines.append(f"{n}.jpg,text {n},{'xy'[n % 2]}")
    (root / "pairs.csv").write_text("\n".join(lines))
    return Data(dir=str(root), image_size=16, text_length=4, vocabulary=100)


def hits(workdir: pathlib.Path, numbers):
    wanted = [
        needle(str(n), "original", p) for n in numbers for p in purge.pieces(grain(n))
    ]
    return purge.search(wanted, [workdir], quiet)["hits"]


@pytest.mark.parametrize("records", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_after_a_purge_nothing_of_the_pictures_is_left(own, tmp_path, records):
    config, workdir = Data(**{**own.__dict__, "records": records}), tmp_path / "w"
    data = load(config, workdir, quiet)
    squares = {str(i): bytes(x) for i, x in zip(data.id, data.image, strict=True)}
    if records:
        assert hits(workdir, range(30))
    chosen = {"3.jpg", "4.jpg", "17.jpg"}
    told = forget(config, workdir, chosen, [workdir], quiet)
    assert told["hits"] == [] and told["pictures"] == 3 and told["even"] == 0
    assert told["needles"] == 18 and told["files"] >= 10
    assert hits(workdir, (3, 4, 17)) == []
    after = load(config, workdir, quiet)
    for i, image in zip(after.id, after.image, strict=True):
        assert bytes(image) == (bytes(768) if str(i) in chosen else squares[str(i)])
    assert after.purged and not data.purged and after.fingerprint == data.fingerprint
    # The user's own files are theirs.
    assert (pathlib.Path(own.dir) / "3.jpg").read_bytes() == grain(3)


def test_copies_that_others_have_left_are_found(own, tmp_path):
    workdir = tmp_path / "w"
    load(own, workdir, quiet)
    (workdir / "notes.bin").write_bytes(b"see " + grain(4))
    square = bytes(np.load(workdir / "data" / "image.npy")[9])
    (workdir / "more.bin").write_bytes(b"\x01" + square)
    ids = np.load(workdir / "data" / "id.npy")
    told = forget(own, workdir, {"4.jpg", str(ids[9])}, [workdir], quiet)
    assert set(told["hits"]) == {
        ("4.jpg", str(workdir / "notes.bin")),
        (str(ids[9]), str(workdir / "more.bin")),
    }


def test_the_pictures_of_a_sample_edition_go_as_well(tmp_path):
    config = Data(dataset="mmimdb", sample_rows=40, image_size=12, vocabulary=100)
    data = load(config, tmp_path, quiet)
    chosen = set(map(str, data.id[:4]))
    posters = {p.stem for p in (tmp_path / "sample").rglob("*.jpeg")}
    assert chosen <= posters
    told = forget(config, tmp_path, chosen, [tmp_path], quiet)
    assert told["hits"] == [] and told["needles"] >= 4
    assert {p.stem for p in (tmp_path / "sample").rglob("*.jpeg")} == posters - chosen
    assert load(config, tmp_path, quiet).fingerprint == data.fingerprint


def test_what_a_killed_run_has_left_goes_as_well(own, tmp_path):
    workdir = tmp_path / "w"
    load(own, workdir, quiet)
    at = prepare.folders(workdir)
    for folder in (at.new, at.old, at.unpacked, at.records / "key"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(grain(4))
    told = forget(own, workdir, {"4.jpg"}, [workdir], quiet)
    assert told["hits"] == [] and hits(workdir, [4]) == []


def test_a_kept_picture_that_is_the_same_is_found_and_one_with_an_equal_part_is_not(
    tmp_path,
):
    root, rng = tmp_path / "own", np.random.default_rng(0)
    root.mkdir()
    squares = rng.integers(0, 255, (30, 16, 16, 3), np.uint8)
    squares[1, 5:] = squares[0, 5:]  # most of it
    squares[3] = squares[2]  # all of it
    lines = ["image,text,label"]
    for n, square in enumerate(squares):
        # Without loss, and yet not the pixels as they are.
        Image.fromarray(square).save(root / f"{n}.tif", compression="tiff_lzw")
        lines.append(f"{n}.tif,text {n},{'xy'[n % 2]}")
    (root / "pairs.csv").write_text("\n".join(lines))
    config = Data(dir=str(root), image_size=16, text_length=4, vocabulary=100)
    load(config, tmp_path / "w", quiet)
    told = forget(config, tmp_path / "w", {"0.tif"}, [tmp_path / "w"], quiet)
    assert told["hits"] == [] and 0 < told["needles"] < 6
    told = forget(config, tmp_path / "w", {"2.tif"}, [tmp_path / "w"], quiet)
    stored = str(tmp_path / "w" / "data" / "image.npy")
    assert told["hits"] == [("2.tif", stored)]


@pytest.mark.parametrize("where", ["_empty", "_own", "search"])
def test_a_purge_that_was_killed_proves_as_much_when_it_is_repeated(
    own, tmp_path, monkeypatch, where
):
    workdir, chosen = tmp_path / "w", {"3.jpg", "4.jpg"}
    load(own, workdir, quiet)
    copy = bytes(np.load(workdir / "data" / "image.npy")[5])
    chosen.add(str(np.load(workdir / "data" / "id.npy")[5]))
    real = getattr(purge, where)

    def killed(*args):
        if where == "_empty":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(purge, where, killed)
    with pytest.raises(KeyboardInterrupt):
        forget(own, workdir, chosen, [workdir], quiet)
    monkeypatch.setattr(purge, where, real)
    # Also where the source is gone, and nothing but hashes tells what there was.
    pathlib.Path(own.dir).rename(tmp_path / "elsewhere")
    (workdir / "left.bin").write_bytes(copy)
    for _ in range(2):
        told = forget(own, workdir, chosen, [workdir], quiet)
        assert told["needles"] == 6 * len(chosen) and told["even"] == 0
        assert [path for _, path in told["hits"]] == [str(workdir / "left.bin")]


def test_what_else_knows_the_pictures_goes_when_it_is_known_that_they_go(own, tmp_path):
    workdir = tmp_path / "w"
    load(own, workdir, quiet)
    seen = []

    def also():
        purged = load_prepared(own, workdir).purged
        image = np.load(workdir / "data" / "image.npy", mmap_mode="r")
        seen.append((purged, (workdir / purge.NEEDLES).exists(), bool(image[3].any())))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget(own, workdir, {"3.jpg"}, [workdir], quiet, also)
    assert seen == [(True, True, True)]
    # So that a run which was killed there is known as a purged one.
    assert load(own, workdir, quiet).purged
    assert forget(own, workdir, {"3.jpg"}, [workdir], quiet)["hits"] == []


def test_even_pictures_are_told_each_time_and_lost_hashes_are_no_proof(own, tmp_path):
    workdir = tmp_path / "w"
    white = io.BytesIO()
    Image.new("RGB", (30, 30), "white").save(white, "PNG")
    (pathlib.Path(own.dir) / "7.jpg").write_bytes(white.getvalue())
    load(own, workdir, quiet)
    for _ in range(2):
        told = forget(own, workdir, {"3.jpg", "7.jpg"}, [workdir], quiet)
        assert told["hits"] == [] and told["even"] <= 1
    (workdir / purge.NEEDLES).unlink()
    pathlib.Path(own.dir).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="purge: 2 pictures, .* nothing can be proved"):
        forget(own, workdir, {"3.jpg", "7.jpg"}, [workdir], quiet)
    (workdir / purge.NEEDLES).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        forget(own, workdir, {"3.jpg"}, [workdir], quiet)


@pytest.mark.parametrize("name", ["labels.npy", "meta.json", "purged.json", "id.npy"])
def test_what_was_purged_does_not_come_back_by_damage(own, tmp_path, name):
    workdir = tmp_path / "w"
    load(own, workdir, quiet)
    forget(own, workdir, {"3.jpg"}, [workdir], quiet)
    before = (workdir / "data" / "image.npy").read_bytes()
    path = workdir / "data" / name
    path.write_bytes(path.read_bytes()[:-10])
    if name == "purged.json":
        assert load(own, workdir, quiet).purged
        path.unlink()
    with pytest.raises(UserError, match="pictures were purged from .*another --work"):
        load(own, workdir, quiet)
    assert (workdir / "data" / "image.npy").read_bytes() == before


def test_folders_that_were_moved_and_linked_are_emptied_and_searched(own, tmp_path):
    workdir = tmp_path / "w"
    load(own, workdir, quiet)
    at = prepare.folders(workdir)
    at.records.mkdir()
    for folder in (at.data, at.records):
        far = tmp_path / "far" / folder.name
        shutil.move(folder, far)
        folder.symlink_to(far)
    (tmp_path / "far" / "records" / "old").mkdir()
    (tmp_path / "far" / "records" / "old" / "file").write_bytes(grain(4))
    (tmp_path / "far" / "data" / "copy").write_bytes(grain(5))
    told = forget(own, workdir, {"4.jpg", "5.jpg"}, [workdir], quiet)
    assert not (tmp_path / "far" / "records").exists()
    assert told["hits"] == [("5.jpg", str(tmp_path / "far" / "data" / "copy"))]


def test_pieces_are_looked_for_by_bytes_that_few_others_have():
    draw = np.random.default_rng(0)
    # White, as most of a drawing is, but for strokes at places of any kind.
    picture = np.full(48 * 48 * 3, 255, np.uint8)
    for start in range(5, len(picture) - 40, 97):
        picture[start : start + 27] = draw.integers(0, 255, 27)
    found = purge.pieces(picture.tobytes())
    assert len(found) == 3
    assert all(len(set(piece[:8])) >= 4 for piece in found)
    # What is varied nowhere so soon is looked for all the same.
    rare = (bytes(8) + bytes(range(24)) + bytes(32)) * 40
    assert all(len(piece) == purge.PIECE for piece in purge.pieces(rare))
    assert purge.pieces(bytes(9999)) == []
