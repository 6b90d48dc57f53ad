"""Purging: no piece of a removed image is left in what a run stores."""

import dataclasses
import io
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import load, load_prepared, purge_images
from ccu_jax.data.preparation import purge
from ccu_jax.data.preparation.prepare import data_paths
from ccu_jax.data.preparation.purge import (
    PATTERN_BYTES,
    PATTERNS_FILE,
    make_pattern,
    search_files,
    select_pieces,
)
from ccu_jax.errors import UserError
from tests.data.readers.layouts import ignore_progress


def encode(pixels, format_="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_, **options)
    return file.getvalue()


def encode_noise(seed):
    """Returns a JPEG that resembles no other."""
    rng = np.random.default_rng(seed)
    return encode(rng.integers(0, 256, (30, 40, 3), np.uint8))


def search(folder, patterns):
    """Searches a folder; returns the numbers of files and bytes, and the hits."""
    return search_files(patterns, [folder], ignore_progress)


def find_originals(folder, seeds):
    pieces = [(seed, x) for seed in seeds for x in select_pieces(encode_noise(seed))]
    patterns = [make_pattern(str(seed), "original", x) for seed, x in pieces]
    return search(folder, patterns)[-1]


def write_pairs(root, images):
    """Writes a data set of encoded images by file name; returns its configuration."""
    root.mkdir()
    lines = ["image,text,label"]
    for n, (name, data) in enumerate(images.items()):
        (root / name).write_bytes(data)
        lines.append(f"{name},text {n},{'xy'[n % 2]}")
    (root / "pairs.csv").write_text("\n".join(lines))
    return Data(dir=str(root), image_size=16, text_length=4, vocabulary=100)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three random files, and a link, which no search follows."""
    monkeypatch.setattr(purge, "_CHUNK", 1000)
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for name, size in (("a.bin", 5000), ("below/b.bin", 5000), ("empty", 0)):
        (tmp_path / name).write_bytes(rng.bytes(size))
    (tmp_path / "link").symlink_to(__file__)
    return tmp_path


@pytest.mark.parametrize("place", [0, 1, 968, 969, 985, 999, 1000, 2345, 4968])
def test_pattern_is_found_at_any_position(folder, place):
    path = folder / "below" / "b.bin"
    piece = path.read_bytes()[place : place + PATTERN_BYTES]
    result = search(folder, [make_pattern("row", "square", piece)])
    assert result == (3, 10_000, [("row", str(path))])


def test_equal_patterns_are_found_once_for_each_row(folder):
    data = (folder / "a.bin").read_bytes()
    pieces = [bytearray(data[start : start + PATTERN_BYTES]) for start in (5, 300)]
    patterns = [make_pattern(id_, "square", p) for id_ in ("x", "y") for p in pieces]
    hits = [(id_, str(folder / "a.bin")) for id_ in ("x", "y")]
    assert search(folder, patterns)[-1] == hits
    for piece in pieces:
        piece[-1] ^= 1
    patterns = [make_pattern("x", "square", piece) for piece in pieces]
    assert search(folder, patterns)[-1] == search(folder, [])[-1] == []


def test_pieces_are_distinctive_and_uniform_images_have_none():
    assert len(select_pieces(encode_noise(0))) == 3
    assert select_pieces(bytes(5000)) == select_pieces(b"short") == []
    for piece in select_pieces(bytes(2000) + encode_noise(1) + bytes(2000)):
        assert len(piece) == PATTERN_BYTES
        assert len(set(piece)) >= 12


def test_pieces_begin_with_rare_bytes_if_possible():
    rng = np.random.default_rng(0)
    drawing = np.full(48 * 48 * 3, 255, np.uint8)  # white with a few strokes
    for start in range(5, len(drawing) - 40, 97):
        drawing[start : start + 27] = rng.integers(0, 255, 27)
    pieces = select_pieces(drawing.tobytes())
    assert len(pieces) == 3 and all(len(set(piece[:8])) >= 4 for piece in pieces)
    # Here no piece begins with rare bytes.
    assert select_pieces((bytes(8) + bytes(range(24)) + bytes(32)) * 40)


@pytest.fixture
def own(tmp_path):
    """The configuration of a user's folder with 30 images."""
    images = {f"{n}.jpg": encode_noise(n) for n in range(30)}
    return write_pairs(tmp_path / "own", images)


@pytest.fixture
def prepared(own, tmp_path):
    """A working folder with the prepared images of `own`."""
    load(own, tmp_path / "w", ignore_progress)
    return tmp_path / "w"


def run_purge(config, workdir, ids, *remove_derived):
    args = (ids, [workdir], ignore_progress, *remove_derived)
    return purge_images(config, workdir, *args)


@pytest.mark.parametrize("records", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_of_purged_images_is_left(own, tmp_path, records):
    config, workdir = dataclasses.replace(own, records=records), tmp_path / "w"
    before = load(config, workdir, ignore_progress)
    images = {str(i): bytes(x) for i, x in zip(before.id, before.image, strict=True)}
    if records:
        assert find_originals(workdir, range(30))
    ids = {"3.jpg", "4.jpg", "17.jpg"}
    result = run_purge(config, workdir, ids)
    assert result.hits == [] and result[:3] == (3, 0, 18) and result.num_files >= 10
    assert find_originals(workdir, (3, 4, 17)) == []
    after = load(config, workdir, ignore_progress)
    for id_, image in zip(after.id, after.image, strict=True):
        assert bytes(image) == (bytes(768) if str(id_) in ids else images[str(id_)])
    assert after.purged and not before.purged
    assert after.fingerprint == before.fingerprint
    # The user's own files are not touched.
    assert (pathlib.Path(own.dir) / "3.jpg").read_bytes() == encode_noise(3)


def test_copies_of_other_programs_are_reported_and_leftovers_removed(own, prepared):
    paths = data_paths(prepared)
    for folder in (paths.new, paths.old, paths.unpacked, paths.records / "key"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(encode_noise(4))
    assert run_purge(own, prepared, {"4.jpg"}).hits == []
    assert find_originals(prepared, [4]) == []
    id_ = str(np.load(paths.data / "id.npy")[9])
    pixels = bytes(np.load(paths.data / "image.npy")[9])
    (prepared / "more.bin").write_bytes(b"\x01" + pixels)
    (prepared / "notes.bin").write_bytes(b"see " + encode_noise(4))
    hits = {("4.jpg", f"{prepared}/notes.bin"), (id_, f"{prepared}/more.bin")}
    assert set(run_purge(own, prepared, {"4.jpg", id_}).hits) == hits


def test_retained_copy_is_reported_but_not_an_image_with_an_equal_part(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), np.uint8)
    pixels[1, 5:] = pixels[0, 5:]  # most of it
    pixels[3] = pixels[2]  # all of it
    # Lossless, but the files do not contain the raw pixels.
    files = [encode(image, "TIFF", compression="tiff_lzw") for image in pixels]
    images = {f"{n}.tif": file for n, file in enumerate(files)}
    config, workdir = write_pairs(tmp_path / "own", images), tmp_path / "w"
    load(config, workdir, ignore_progress)
    result = run_purge(config, workdir, {"0.tif"})
    assert result.hits == [] and 0 < result.num_patterns < 6
    result = run_purge(config, workdir, {"2.tif"})
    assert result.hits == [("2.tif", str(workdir / "data" / "image.npy"))]


@pytest.mark.parametrize(
    "function", ["_remove_stored_images", "_drop_shared_patterns", "search_files"]
)
def test_repeating_a_killed_purge_verifies_as_much(
    own, prepared, tmp_path, monkeypatch, function
):
    pixels = bytes(np.load(prepared / "data" / "image.npy")[5])
    ids = {"3.jpg", "4.jpg", str(np.load(prepared / "data" / "id.npy")[5])}
    complete = getattr(purge, function)

    def kill(*args):
        if function == "_remove_stored_images":
            complete(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(purge, function, kill)
    with pytest.raises(KeyboardInterrupt):
        run_purge(own, prepared, ids)
    monkeypatch.setattr(purge, function, complete)
    # Even if the source is gone, and only the hashes are left.
    pathlib.Path(own.dir).rename(tmp_path / "elsewhere")
    (prepared / "left.bin").write_bytes(pixels)
    for _ in range(2):
        result = run_purge(own, prepared, ids)
        assert (result.num_patterns, result.num_uniform) == (6 * len(ids), 0)
        assert [path for _, path in result.hits] == [str(prepared / "left.bin")]


def test_derived_models_are_removed_after_the_data_are_marked_as_purged(own, prepared):
    states = []

    def remove_derived():
        image = np.load(prepared / "data" / "image.npy", mmap_mode="r")
        is_marked = load_prepared(own, prepared).purged
        states.append((is_marked, (prepared / PATTERNS_FILE).exists(), image[3].any()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_purge(own, prepared, {"3.jpg"}, remove_derived)
    assert states == [(True, True, True)]
    assert load(own, prepared, ignore_progress).purged
    assert run_purge(own, prepared, {"3.jpg"}).hits == []


def test_removal_cannot_be_verified_without_the_patterns(own, tmp_path):
    workdir = tmp_path / "w"
    white = encode(np.full((30, 30, 3), 255, np.uint8), "PNG")
    (pathlib.Path(own.dir) / "7.jpg").write_bytes(white)
    load(own, workdir, ignore_progress)
    for _ in range(2):
        result = run_purge(own, workdir, {"3.jpg", "7.jpg"})
        assert result.hits == [] and result.num_uniform <= 1
    (workdir / PATTERNS_FILE).unlink()
    pathlib.Path(own.dir).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="purge: 2 images, .* cannot be verified"):
        run_purge(own, workdir, {"3.jpg", "7.jpg"})
    (workdir / PATTERNS_FILE).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        run_purge(own, workdir, {"3.jpg"})


@pytest.mark.parametrize("name", ["labels.npy", "meta.json", "purged.json", "id.npy"])
def test_damage_does_not_bring_purged_images_back(own, prepared, name):
    run_purge(own, prepared, {"3.jpg"})
    images = (prepared / "data" / "image.npy").read_bytes()
    path = prepared / "data" / name
    path.write_bytes(path.read_bytes()[:-10])
    if name == "purged.json":  # its existence counts, not its content
        assert load(own, prepared, ignore_progress).purged
        path.unlink()
    with pytest.raises(UserError, match="images were purged from .* another --work"):
        load(own, prepared, ignore_progress)
    assert (prepared / "data" / "image.npy").read_bytes() == images


def test_linked_folders_are_emptied_and_searched(own, prepared, tmp_path):
    paths = data_paths(prepared)
    paths.records.mkdir()
    for folder in (paths.data, paths.records):
        target = tmp_path / "elsewhere" / folder.name
        shutil.move(folder, target)
        folder.symlink_to(target)
    (tmp_path / "elsewhere" / "records" / "file").write_bytes(encode_noise(4))
    copy = tmp_path / "elsewhere" / "data" / "copy"
    copy.write_bytes(encode_noise(5))
    result = run_purge(own, prepared, {"4.jpg", "5.jpg"})
    assert not (tmp_path / "elsewhere" / "records").exists()
    assert result.hits == [("5.jpg", str(copy))]
