"""A short run of the fuzzer, faults that it must find, and cases that it found."""

import io
import os
import re
import subprocess
import sys
import time
from random import Random

import numpy as np
import pytest
from PIL import Image

from ccu_jax.data import near_duplicates
from ccu_jax.data.preparation import images
from ccu_jax.data.readers import pairs, untrusted_files
from ccu_jax.data.readers.fashion200k import LABEL_FILES
from ccu_jax.data.tokenizer import END, PAD, UNKNOWN, encode, train_tokenizer
from tests.data.readers.layouts import dump_lines
from tests.fuzz import sandbox as sandbox_module
from tests.fuzz.__main__ import TARGETS, run_campaign
from tests.fuzz.archives import draw_archive
from tests.fuzz.checks import read_case
from tests.fuzz.contents import IMAGES, SMALL
from tests.fuzz.data_sets import CASES, Case

PNG = SMALL[0]


@pytest.fixture
def read():
    """Reads files as a data set, and returns the counts."""
    with sandbox_module.make_sandbox() as sandbox:

        def run(dataset, tree, **options):
            sandbox.clear()
            return read_case(sandbox, Case(dataset, tree, {}), **options)

        yield run


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "num_cases, seed", [(250, 0), pytest.param(2000, 1, marks=pytest.mark.slow)]
)
def test_hostile_files_cause_clear_errors_and_nothing_else(target, num_cases, seed):
    campaign = run_campaign(target, range(num_cases), seed)
    assert campaign.failures == {}
    assert len(campaign.outcomes) >= 10  # many paths through the code


def test_number_repeats_a_case():
    for draw in (*CASES.values(), draw_archive):
        assert draw(Random("3/7")) == draw(Random("3/7"))


NEVER = re.compile("$a")
FAULTS = [
    ("mmimdb", untrusted_files, "is_within", lambda path, folder: True),
    ("hatefulmemes", untrusted_files, "_SURROGATES", NEVER),
    ("jsonl", pairs, "_FORBIDDEN", NEVER),
    ("csv", untrusted_files, "decode_utf8", lambda data, what: data.decode()),
]


@pytest.mark.parametrize("target, module, name, replacement", FAULTS)
def test_fault_of_a_reader_is_found(monkeypatch, target, module, name, replacement):
    monkeypatch.setattr(module, name, replacement)
    assert run_campaign(target, range(600), seed=0).failures


def test_reader_that_hangs_is_found(monkeypatch):
    def hang(text):
        while True:
            pass

    monkeypatch.setattr(sandbox_module, "MAX_CPU_S", 0.05)
    monkeypatch.setattr(pairs, "clean_text", hang)
    (failure,) = run_campaign("jsonl", range(20), seed=0).failures
    assert failure.startswith("Hang")


def make_jsonl(*rows):
    """Returns pairs.jsonl with two valid rows and these."""
    valid = [{"id": name, "text": "a", "label": name} for name in "xy"]
    return {"pairs.jsonl": dump_lines([*valid, *rows])}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_names_of_folders_need_not_be_unicode(read):
    odd = "caf\udce9"
    counts = read("pairs", {f"{odd}/1.png": PNG, "x/1.png": PNG, "y/1.png": PNG})
    assert counts["skipped: image has an impossible character"] == 1
    row = b'{"image": "%b/1.png", "label": "x"}' % os.fsencode(odd)
    tree = {"pairs.jsonl": make_jsonl()["pairs.jsonl"] + row, f"{odd}/1.png": PNG}
    assert read("pairs", tree)["skipped: line is not UTF-8"] == 1
    path = "women/dresses/gowns/1/1_0.jpeg"
    tree = {f"labels/{name}": f"{path}\t0\ta".encode() for name in LABEL_FILES}
    counts = read("fashion200k", tree | {path: PNG, f"women/{odd}/1.jpeg": PNG})
    assert counts["ignored: image that no label file lists"] == 1


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb"])
def test_names_of_folders_do_not_garble_messages(read, name):
    for dataset, file in (("pairs", "pairs.csv"), ("hatefulmemes", "train.jsonl")):
        (error,) = read(dataset, {f"{name}/{file}": b"a,b\n"})
        assert error.startswith("error: data.dir: ") and error.isprintable()


def test_data_set_without_images_can_be_stored(read):
    assert read("pairs", make_jsonl(), store=True)["stored"] == 1
    for band in range(7):
        assert not list(near_duplicates.candidate_pairs(np.zeros(0, np.uint64), band))


def test_damage_after_the_first_frame_does_not_matter():
    data = IMAGES["gif"]
    intact = images.decode(data, 8)
    for size in range(12):  # of a second frame, which is truncated
        pixels, notes = images.decode(data[:-1] + b"," + b"\xff" * size, 8)
        np.testing.assert_array_equal(pixels, intact.pixels)
        assert set(notes) <= {*intact.notes, "noted: animated image"}


@pytest.mark.parametrize("crop_margins", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_large_image_is_decoded_like_a_small_one(monkeypatch, mode, crop_margins):
    file = io.BytesIO()
    image = Image.open(io.BytesIO(IMAGES[f"png {mode}"]))
    image.resize((333, 250)).save(file, "PNG")
    small = images.decode(file.getvalue(), 16, crop_margins)
    monkeypatch.setattr(images, "_HEAVY_PIXELS", 1000)
    monkeypatch.setattr(images, "_TILE", 64)
    large = images.decode(file.getvalue(), 16, crop_margins)
    assert large.notes == small.notes
    difference = np.abs(large.pixels.astype(int) - small.pixels.astype(int))
    assert difference.mean() < 3 and difference.max() < 24


def test_small_file_of_a_huge_image_takes_little_memory():
    code = """if True:
        import resource, struct, sys
        from ccu_jax.data.preparation import images
        def peak():
            unit = 20 if sys.platform == "darwin" else 10
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
        data = sys.stdin.buffer.read()
        images.decode(data, 8)
        before = peak()
        huge = data[:6] + struct.pack("<HH", 10_900, 11_000) + data[10:]
        assert "noted: image above 40 megapixels" in images.decode(huge, 8, True)[1]
        print(peak() - before)
    """
    command = [sys.executable, "-c", code]
    data = IMAGES["gif"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert 0 <= int(done.stdout) < 300  # MiB; the image itself takes 114


def test_long_word_takes_little_time():
    word = "".join(chr(97 + (n * n * 7 + n // 3) % 26) for n in range(300_000))
    start_s = time.process_time()
    tokenizer = train_tokenizer([word], 300)
    tokens = encode(tokenizer, [word, "xyz"], 500)
    assert time.process_time() - start_s < 4
    assert tokens.min() > PAD - 1 and UNKNOWN not in tokens[0]
    assert (tokens[0] > END).sum() == 499
