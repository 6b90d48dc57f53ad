"""Hostile files: a short run of `fuzz_readers.py`, hypothesis, and what they found."""

import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers import fashion200k_titles as fashion_titles
from ccu_jax.data.readers import mmimdb, pairs
from ccu_jax.data.readers import untrusted_files as files
from ccu_jax.data.readers.base import SkipExample
from ccu_jax.data.readers.fashion200k_labels import LABEL_FILES
from ccu_jax.data.tokenizer import END, PAD, UNKNOWN, encode, train_tokenizer
from tests.fuzz import __main__ as fuzz_readers
from tests.fuzz import archives as fuzz_archives
from tests.fuzz import checks as fuzz_checks
from tests.fuzz import data_sets as fuzz_data_sets
from tests.fuzz import pictures as fuzz_pictures
from tests.fuzz import world as fuzz_world
from tests.fuzz.contents import Link
from tests.fuzz.data_sets import Case

PNG = fuzz_pictures.SMALL[0]
# More of them: FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz -k anything
EXAMPLES = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)), deadline=None, database=None
)


@pytest.fixture(scope="module")
def world():
    with fuzz_world.world() as here, fuzz_world.alarms():
        yield here


@pytest.fixture
def read(world):
    """A function that reads a tree as a data set, and gives what is counted."""

    def run(dataset, tree, **more):
        options = {k: more.pop(k) for k in ("strict", "whole") if k in more}
        try:
            return fuzz_checks.read(world, Case(dataset, tree, more), **options)
        finally:
            world.clear()

    return run


# --- many cases -----------------------------------------------------------------------


@pytest.mark.parametrize("target", fuzz_readers.TARGETS)
def test_hostile_files_cause_clear_errors_and_nothing_else(target):
    found = fuzz_readers.campaign(target, range(250), seed=0)
    assert found.failures == {} and found.cases == 250
    assert len(found.outcomes) >= 10  # far more than one way through the code


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz_readers.TARGETS)
def test_more_hostile_files_cause_clear_errors_and_nothing_else(target):
    found = fuzz_readers.campaign(target, range(2000), seed=1)
    assert found.failures == {} and found.cases == 2000


def test_a_case_is_the_same_whenever_its_number_is_drawn():
    for name, make in fuzz_data_sets.CASES.items():
        one, other = (make(random.Random(f"3/{name}/7")) for _ in range(2))
        assert one == other
    assert fuzz_archives.archive(random.Random(5)) == fuzz_archives.archive(
        random.Random(5)
    )


NEVER = re.compile("$a")
BROKEN = {
    "links are followed": ("mmimdb", files, "is_within", lambda path, folder: True),
    "halves of characters stay": ("hatefulmemes", files, "_SURROGATES", NEVER),
    "names hold anything": ("jsonl", pairs, "_FORBIDDEN", NEVER),
    "damage is no reason": (
        "csv",
        files,
        "decode_utf8",
        lambda data, what: data.decode(),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_harness_sees_what_is_wrong(monkeypatch, what):
    target, module, name, replacement = BROKEN[what]
    monkeypatch.setattr(module, name, replacement)
    assert fuzz_readers.campaign(target, range(600), seed=0).failures


def test_the_harness_sees_a_reader_that_hangs(monkeypatch):
    monkeypatch.setattr(fuzz_world, "BUSY_S", 0.05)

    def endless(text):
        while True:
            pass

    monkeypatch.setattr(pairs, "clean_text", endless)
    (failure,) = fuzz_readers.campaign("jsonl", range(20), seed=0).failures
    assert failure.startswith("Hang")


# --- hypothesis -----------------------------------------------------------------------

TEXTS = st.text(max_size=30) | st.sampled_from(("..", ".", "a/b", "# a", "\x85", "\0"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)
LABELS = st.sampled_from(("x", "y")) | VALUES
PAIRS = st.fixed_dictionaries(
    {
        "id": st.sampled_from("abcdefgh") | VALUES,
        "label": LABELS,
        "text": TEXTS | VALUES,
    },
    optional={
        "image": st.sampled_from(("images/1.png", "images/../2.png")) | VALUES,
        "labels": st.lists(LABELS, max_size=3) | VALUES,
        "split": st.sampled_from(("train", "test", "Dev")) | VALUES,
        "group": st.sampled_from(("g", "h")) | VALUES,
    },
)
MEMES = st.fixed_dictionaries(
    {
        "img": st.sampled_from(("img/1.png", "img/2.png")) | TEXTS.map("img/".__add__),
        "label": st.sampled_from((0, 1)) | VALUES,
    },
    optional={"id": st.integers(0, 3) | VALUES, "text": TEXTS | VALUES},
)
MOVIES = st.fixed_dictionaries(
    {"plot": st.lists(TEXTS, min_size=1, max_size=3) | VALUES},
    optional={"genres": st.lists(st.sampled_from((*mmimdb.GENRES, "News"))) | VALUES},
)


def dumped(rows):
    return b"\n".join(json.dumps(row).encode() for row in rows)


@EXAMPLES
@given(st.lists(PAIRS, min_size=1, max_size=6), st.booleans())
def test_anything_may_stand_in_a_row_of_pairs(world, rows, whole):
    tree = {"pairs.jsonl": dumped(rows), "images/1.png": PNG}
    fuzz_checks.read(world, Case("pairs", tree, {}), whole=whole)
    world.clear()


@EXAMPLES
@given(st.lists(st.text(alphabet='ab,;|"\r\n \u00e9\0', max_size=40), max_size=6))
def test_anything_may_stand_in_a_csv_file(world, lines):
    data = "\n".join(["id,text,label", "a,b,c", *lines]).encode()
    fuzz_checks.read(world, Case("pairs", {"pairs.csv": data}, {}))
    world.clear()


@EXAMPLES
@given(st.lists(MEMES, max_size=4), st.lists(MEMES, max_size=4), st.booleans())
def test_anything_may_stand_in_a_list_of_memes(world, train, dev, whole):
    tree = {f"img/{n}.png": PNG for n in range(3)}
    tree |= {"train.jsonl": dumped(train), "dev.jsonl": dumped(dev)}
    fuzz_checks.read(world, Case("hatefulmemes", tree, {}), whole=whole)
    world.clear()


@EXAMPLES
@given(st.lists(MOVIES, max_size=3), st.lists(VALUES, max_size=3), st.booleans())
def test_anything_may_stand_in_the_files_of_movies(world, movies, ids, whole):
    tree, names = {}, [f"{n:07d}" for n in range(len(movies))]
    for name, movie in zip(names, movies, strict=True):
        tree |= {f"dataset/{name}.json": dumped([movie]), f"dataset/{name}.jpeg": PNG}
    splits = {"train": [*names, *ids], "dev": ids, "test": names[:1]}
    tree["split.json"] = dumped([splits])
    fuzz_checks.read(world, Case("mmimdb", tree, {}), whole=whole)
    world.clear()


@EXAMPLES
@given(st.lists(st.text(max_size=40), max_size=4), st.booleans())
def test_anything_may_stand_in_a_label_file(world, titles, masked):
    path = "women/dresses/gowns/1/1_{}.jpeg"
    lines = [f"{path.format(n)}\t0\t{title}\n" for n, title in enumerate(titles)]
    tree = {f"labels/{name}": b"" for name in LABEL_FILES} | {path.format(0): PNG}
    tree["labels/dress_train_detect_all.txt"] = "".join(lines).encode()
    more = {"mask_category_words": masked, "tirg_dot_token": masked}
    fuzz_checks.read(world, Case("fashion200k", tree, more))
    world.clear()


@EXAMPLES
@given(st.sampled_from(list(fuzz_pictures.PICTURES.values())), st.data())
def test_anything_may_stand_in_a_picture(world, data, draw):
    first = draw.draw(st.integers(0, len(data)))
    changed = draw.draw(st.binary(max_size=12))
    last = first + draw.draw(st.integers(0, 12))
    fuzz_checks.decode(world, data[:first] + changed + data[last:], 8, True)


# --- what was found -------------------------------------------------------------------


def jsonl(*rows):
    two = (
        {"id": "a", "text": "a", "label": "x"},
        {"id": "b", "text": "b", "label": "y"},
    )
    return {"pairs.jsonl": dumped((*two, *rows))}


@pytest.mark.parametrize("name", [".", "./", ".//.", "images"])
def test_a_folder_is_no_picture(read, name):
    counts = read("pairs", jsonl({"image": name, "label": "x"}) | {"images/1.png": PNG})
    assert counts["skipped: image is no plain file"] == 1 and counts["used"] == 2


def test_a_path_of_many_folders_is_not_followed(read):
    begun = time.process_time()
    counts = read("pairs", jsonl({"id": "c", "image": "a/" * 500_000, "label": "x"}))
    assert counts["skipped: image missing"] == 1
    assert time.process_time() - begun < 4


@pytest.mark.skipif(sys.platform != "linux", reason="names there are Unicode")
def test_folders_may_have_names_that_are_no_unicode(read):
    odd = "caf\udce9"
    counts = read("pairs", {f"{odd}/1.png": PNG, "x/1.png": PNG, "y/1.png": PNG})
    assert counts["skipped: image has an impossible character"] == 1
    row = b'\n{"image": "%b/1.png", "label": "x"}' % os.fsencode(odd)
    tree = {"pairs.jsonl": jsonl()["pairs.jsonl"] + row, f"{odd}/1.png": PNG}
    assert read("pairs", tree)["skipped: line is not UTF-8"] == 1
    path = "women/dresses/gowns/1/1_0.jpeg"
    tree = {f"labels/{name}": f"{path}\t0\ta".encode() for name in LABEL_FILES}
    counts = read("fashion200k", tree | {path: PNG, f"women/{odd}/1.jpeg": PNG})
    assert counts["ignored: image that no label file lists"] == 1


@pytest.mark.parametrize("odd", ["a\x9b31mb", "a\x85b", "a\u2028b"])
@pytest.mark.parametrize("field", ["id", "group", "label"])
def test_names_do_not_command_a_terminal(read, field, odd):
    row = {"id": "c", "text": "c", "label": "x"} | {field: odd}
    counts = read("pairs", jsonl(row))
    assert counts[f"skipped: {field} has an impossible character"] == 1
    (error,) = read("pairs", jsonl(row), strict=True)
    assert error.startswith("error: ") and error.isprintable()


def test_ids_that_a_list_of_ids_would_lose_are_refused(read):
    counts = read("pairs", jsonl({"id": "# a", "text": "c", "label": "x"}), whole=True)
    assert counts["skipped: id begins as a comment in a list of ids does"] == 1
    names = ("img/# a.png", "img/ a.png", "img/#.png", "img/a.png", "img/#a.png")
    rows = [{"img": name, "label": n % 2, "text": "a"} for n, name in enumerate(names)]
    lists = {"train.jsonl": dumped(rows), "dev.jsonl": dumped([])}
    lists["test.jsonl"] = dumped([{"img": "img/b.png", "label": 0}])
    tree = lists | dict.fromkeys((*names, "img/b.png"), PNG)
    counts = read("hatefulmemes", tree, whole=True)
    assert counts["skipped: img is no path below img/"] == 3 and counts["used"] == 3


@pytest.mark.parametrize(
    "dataset, name, target",
    [
        ("mmimdb", "mmimdb", "mmimdb"),
        ("mmimdb", "mmimdb.tar.gz", "secret.tar.gz"),
        ("fashion200k", "fashion-200k", "fashion"),
        ("hatefulmemes", "data", "memes"),
        ("pairs", "pairs.jsonl", "pairs.jsonl"),
        ("pairs", "pairs.csv", "pairs.csv"),
    ],
)
def test_links_out_of_the_folder_are_refused(read, dataset, name, target):
    (error,) = read(dataset, {name: Link("{outside}/" + target)})
    assert f"ROOT/{name} is a link out of its folder" in error


def test_links_that_go_round_are_no_files(read):
    row = {"img": "img/1.png", "label": 0, "text": "a"}
    tree = {
        "train.jsonl": dumped([row]),
        "test.jsonl": dumped([row | {"img": "img/2"}]),
    }
    tree |= {"img/1.png": PNG, "img/2": PNG, "dev.jsonl": Link("dev.jsonl")}
    assert read("hatefulmemes", tree)["used"] == 2
    tree = {"x/1.png": PNG, "y/1.png": PNG, "y/2.png": Link("2.png")}
    counts = read("pairs", tree | {"y/z": Link("z")})
    assert counts["skipped: image cannot be read"] == 1 and counts["used"] == 2


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb"])
def test_names_of_folders_do_not_garble_messages(read, name):
    for dataset, tree in (
        ("pairs", {f"{name}/pairs.csv": b"a,b\n"}),
        ("hatefulmemes", {f"{name}/train.jsonl": b"{}"}),
    ):
        (error,) = read(dataset, tree)
        assert error.startswith("error: data.dir: ") and error.isprintable()


def test_what_is_broken_behind_the_first_picture_does_not_matter():
    data = fuzz_pictures.PICTURES["gif"]
    whole = pictures.decode(data, 8)
    for size in range(12):  # of a second picture, which breaks off
        square, notes = pictures.decode(data[:-1] + b"," + b"\xff" * size, 8)
        np.testing.assert_array_equal(square, whole.pixels)
        assert set(notes) <= {*whole.notes, "noted: animated image"}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_heavy_picture_looks_as_if_it_were_a_light_one(monkeypatch, mode, trim):
    image = Image.open(io.BytesIO(fuzz_pictures.PICTURES[f"png {mode}"]))
    file = io.BytesIO()
    image.resize((333, 250)).save(file, "PNG")
    whole = pictures.decode(file.getvalue(), 16, trim)
    monkeypatch.setattr(pictures, "_HEAVY", 1000)
    monkeypatch.setattr(pictures, "_TILE", 64)
    heavy = pictures.decode(file.getvalue(), 16, trim)
    assert heavy.notes == whole.notes
    apart = np.abs(heavy.pixels.astype(int) - whole.pixels.astype(int))
    assert apart.mean() < 3 and apart.max() < 24


def test_a_small_file_of_a_huge_picture_takes_little_memory():
    code = """if True:
        import resource, struct, sys
        from ccu_jax.data.preparation import images as pictures
        def peak():
            unit = 20 if sys.platform == "darwin" else 10
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
        data = sys.stdin.buffer.read()
        pictures.decode(data, 8)
        before = peak()
        huge = data[:6] + struct.pack("<HH", 10_900, 11_000) + data[10:]
        assert "noted: image above 40 megapixels" in pictures.decode(huge, 8, True)[1]
        print(peak() - before)
    """
    run = [sys.executable, "-c", code]
    data = fuzz_pictures.PICTURES["gif"]
    done = subprocess.run(run, input=data, capture_output=True, check=True)
    assert 0 <= int(done.stdout) < 300  # MiB; the picture itself has 114


def test_a_picture_of_endless_rows_is_refused():
    data = fuzz_pictures.PICTURES["png 1"]
    high = data[:16] + struct.pack(">II", 1, 100_000_000) + data[24:]
    with pytest.raises(SkipExample, match="image too large"):
        pictures.decode(fuzz_pictures.checked_png(high), 8)


def test_quotes_that_are_never_closed_cost_no_square_of_the_file(read):
    begun = time.process_time()
    counts = read("pairs", {"pairs.csv": b"id,text,label\n" + b'a","\n' * 20_000})
    assert counts == {"read": 20_000, "skipped: line is no valid CSV": 20_000}
    assert time.process_time() - begun < 4


def test_a_quote_that_is_never_closed_costs_its_own_row_and_no_other(read):
    good = b"".join(b"r%d,a text,%c\n" % (n, b"xy"[n % 2]) for n in range(9000))
    counts = read("pairs", {"pairs.csv": b'id,text,label\nodd,"a,x\n' + good})
    assert counts["used"] == 9000 and counts["skipped: line is no valid CSV"] == 1


@pytest.mark.parametrize(
    "title", ["a" + "!" * 10**6 + "a-dress", "dress" * 200_000 + "x", "\u00c3" * 10**6]
)
def test_a_long_title_takes_no_square_of_its_length(title):
    begun = time.process_time()
    fashion_titles.clean_title(
        title, fashion_titles.compile_class_words(["dress", "top"]), True
    )
    assert time.process_time() - begun < 3


def test_a_long_word_takes_no_square_of_its_length():
    word = "".join(chr(97 + (n * n * 7 + n // 3) % 26) for n in range(300_000))
    begun = time.process_time()
    tokenizer = train_tokenizer([word], 300)
    tokens = encode(tokenizer, [word, "xyz"], 500)
    assert time.process_time() - begun < 4
    assert tokens.min() > PAD - 1 and (tokens[0] > END).sum() == 499
    # One that has no end for people either is cut up, and no part of it is unknown.
    assert (tokens[0] != UNKNOWN).all()


def test_a_movie_cannot_take_all_memory(read):
    data = b'{"genres": [' + b"{}," * 6_000_000 + b'"Drama"], "plot": ["a"]}'
    splits = dumped([{"train": ["0000001"], "dev": [], "test": []}])
    tree = {"dataset/0000001.json": data, "dataset/0000001.jpeg": PNG}
    counts = read("mmimdb", tree | {"split.json": splits})
    assert counts["skipped: text file too large"] == 1


def test_a_data_set_without_any_picture_can_be_stored(read):
    assert read("pairs", jsonl(), whole=True)["stored"] == 1
    for band in range(7):
        assert not list(duplicates.candidate_pairs(np.zeros(0, np.uint64), band))


def test_a_damaged_archive_is_told_of_in_a_short_line(world):
    data, name = io.BytesIO(), "/".join(["a" * 200] * 9)
    with zipfile.ZipFile(data, "w") as opened:
        opened.writestr(name, b"")
    torn = data.getvalue().replace(name.encode(), name.encode()[::-1].upper(), 1)
    (error,) = fuzz_checks.unpack(world, torn)
    assert error == "error: ROOT/a is damaged: fetch or copy it again"
    world.clear()
    info = tarfile.TarInfo("../" + "a" * 60_000)
    (error,) = fuzz_checks.unpack(world, info.tobuf() + bytes(1024), strict=True)
    assert error.isprintable() and len(error) < 400
    world.clear()


def test_folders_of_members_count_as_something_to_unpack(world, monkeypatch):
    monkeypatch.setattr(archive, "MIN_LIMIT_BYTES", 1 << 20)
    members = (tarfile.TarInfo(f"{n}" + "/a" * 90) for n in range(60))
    data = b"".join(info.tobuf() for info in members) + bytes(1024)
    monkeypatch.setattr(archive, "MAX_RATIO", 1)
    (error,) = fuzz_checks.unpack(world, data)
    assert "decompression bomb" in error
    world.clear()
