"""Pairs, the prepared form, the tokeniser and the plan of batches."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config import Data
from ccu_jax.data import load, pipeline, text
from ccu_jax.errors import UserError


def quiet(what, done, total):
    """A progress callback that says nothing."""


def picture(colour="red", size=(12, 8), mode="RGB", kind="PNG"):
    """An encoded picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A function that writes pairs.jsonl (and a picture for each row that has one)."""
    root = tmp_path / "pairs"
    (root / "images").mkdir(parents=True)

    def write(rows, pictures=None):
        for n, row in enumerate(rows):
            if isinstance(row, dict) and str(row.get("image")).startswith("images/"):
                data = (pictures or {}).get(n, picture())
                if data is not None:
                    (root / row["image"]).write_bytes(data)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        (root / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
        return Data(dir=str(root), image_size=8, text_length=6, vocabulary=100)

    return write


def rows(number, **more):
    """Valid rows of two classes, alternating."""
    return [
        {"image": f"images/{n}.png", "text": f"a thing {n}", "label": "xy"[n % 2]}
        | more
        for n in range(number)
    ]


# --- the plan of batches --------------------------------------------------------------


def test_every_epoch_of_the_plan_is_a_permutation():
    chosen = np.array([3, 5, 8, 9, 11, 40, 41])
    plan = pipeline.batches(chosen, batch=4, steps=7, seed=1).reshape(4, 7)
    assert plan.dtype == np.int32
    assert all(sorted(epoch) == chosen.tolist() for epoch in plan)
    assert len({tuple(epoch) for epoch in plan}) > 1


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_a_plan_resumed_at_any_step_goes_on_as_if_uninterrupted(batch):
    chosen = np.arange(10)
    whole = pipeline.batches(chosen, batch, steps=12, seed=7)
    for start in range(12):
        rest = pipeline.batches(chosen, batch, steps=12 - start, seed=7, start=start)
        np.testing.assert_array_equal(rest, whole[start:])


def test_the_plan_depends_on_the_seed():
    plans = [pipeline.batches(np.arange(50), 8, 5, seed) for seed in (0, 0, 1)]
    assert (plans[0] == plans[1]).all()
    assert (plans[0] != plans[2]).any()


def test_a_plan_of_no_rows_is_refused_and_one_of_no_steps_is_empty():
    with pytest.raises(ValueError, match="non-empty"):
        pipeline.batches(np.arange(0), 4, 1, 0)
    assert pipeline.batches(np.arange(3), 4, 0, 0, start=5).shape == (0, 4)


# --- squares --------------------------------------------------------------------------


def test_a_wide_picture_keeps_its_ratio_between_white_bars():
    image = pipeline.square(picture("red", (40, 20)), 16)
    assert (image[4:12] == [255, 0, 0]).all()
    assert (image[:4] == 255).all() and (image[12:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (9, 9), "white").convert(mode.replace(";16", ""))
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 65535, np.uint16))
    file = io.BytesIO()
    image.save(file, "PNG")
    square = pipeline.square(file.getvalue(), 8)
    assert square.shape == (8, 8, 3) and square.min() == 255


def test_cmyk_becomes_rgb_and_hidden_colours_become_white():
    cmyk = pipeline.square(picture((0, 255, 255, 0), mode="CMYK", kind="JPEG"), 12)
    assert np.abs(cmyk[6].astype(int) - [255, 0, 0]).max() < 30
    clear = pipeline.square(picture((9, 9, 9, 0), mode="RGBA"), 8)
    assert (clear == 255).all()


def test_the_turn_noted_in_exif_is_ignored():
    image, file = Image.new("RGB", (20, 10), "red"), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    assert (pipeline.square(file.getvalue(), 20)[:4] == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "picture empty"),
        (b"<html>not found</html>", "not a picture"),
        (picture(kind="JPEG", size=(300, 300))[:-40], "picture damaged"),
        (picture(size=(300, 300))[:60], "picture damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_what_is_no_whole_picture_is_named(data, reason):
    with pytest.raises(pipeline.Unusable, match=reason):
        pipeline.square(data, 8)


@pytest.mark.parametrize("side", [11_000, 20_000])
def test_a_decompression_bomb_is_not_decoded(side):
    bomb = picture(0, (side, side), mode="1")
    with pytest.raises(pipeline.Unusable, match="too large"):
        pipeline.square(bomb, 8)


# --- what is refused ------------------------------------------------------------------


def test_wrong_names_and_sizes_are_told_plainly(tmp_path):
    with pytest.raises(UserError, match="'coco' is none of .*mmimdb, pairs"):
        load(Data(dataset="coco"), tmp_path / "w", quiet)
    with pytest.raises(UserError, match="data.image_size: 0"):
        load(Data(image_size=0), tmp_path / "w", quiet)
    with pytest.raises(UserError, match="data.test 0.6 and data.validation 0.4"):
        load(Data(test=0.6, validation=0.4), tmp_path / "w", quiet)


def test_data_without_one_fit_row_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no usable row left"):
        load(folder([]), tmp_path / "w", quiet)
    with pytest.raises(UserError, match="no usable row left .*4 skipped: not a pict"):
        bad = dict.fromkeys(range(4), b"<html>")
        load(folder(rows(4), bad), tmp_path / "w", quiet)


# --- the prepared form ----------------------------------------------------------------


def test_the_second_load_maps_the_same_rows(folder, tmp_path):
    config, told = folder(rows(8)), []
    first = load(config, tmp_path / "w", lambda *stage: told.append(stage))
    assert told and {len(stage) for stage in told} == {3}
    told.clear()
    second = load(config, tmp_path / "w", lambda *stage: told.append(stage))
    assert not told and first.fingerprint == second.fingerprint
    assert isinstance(second.image, np.memmap) and not second.image.flags.writeable
    for name in first._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_other_settings_or_changed_files_are_prepared_anew(folder, tmp_path):
    config = folder(rows(8))
    first = load(config, tmp_path / "w", quiet)
    (tmp_path / "pairs" / "images" / "new").write_bytes(picture("blue"))
    larger = Data(**{**config.__dict__, "image_size": 16})
    assert load(larger, tmp_path / "w", quiet).image.shape == (8, 16, 16, 3)
    (tmp_path / "pairs" / "images" / "new").rename(
        tmp_path / "pairs" / "images" / "0.png"
    )
    assert load(config, tmp_path / "w", quiet).fingerprint != first.fingerprint
    folder(rows(9))
    second = load(config, tmp_path / "w", quiet)
    assert len(second.id) == 9 and second.fingerprint != first.fingerprint


def test_prepared_data_outlive_their_source_but_not_their_damage(folder, tmp_path):
    config = folder(rows(8))
    first = load(config, tmp_path / "w", quiet)
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    assert load(config, tmp_path / "w", quiet).fingerprint == first.fingerprint
    (tmp_path / "elsewhere").rename(tmp_path / "pairs")
    os.truncate(tmp_path / "w" / "data" / "image.npy", 500)
    again = load(config, tmp_path / "w", quiet)
    assert again.fingerprint == first.fingerprint and again.image[-1].any()


def test_the_workdir_may_lie_below_the_data(folder, tmp_path):
    config, told = folder(rows(8)), []
    inside = tmp_path / "pairs" / "run"
    load(config, inside, quiet)
    (inside / "results.json").write_text("[]")
    load(config, inside, lambda *stage: told.append(stage))
    assert not told


def test_leftovers_of_a_killed_run_do_no_harm(folder, tmp_path):
    config = folder(rows(8))
    for name in ("data.new", "data.old"):
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / "meta.json").write_text("{}")
    assert len(load(config, tmp_path / "w", quiet).id) == 8
    left = {path.name for path in (tmp_path / "w").iterdir()}
    assert left == {"data", "data.lock"}


LOAD = """
import sys, pathlib
from ccu_jax.config import Data
from ccu_jax.data import load
tell = lambda *told: print("at work", flush=True)
data = load(Data(), pathlib.Path(sys.argv[1]), tell)
print(data.fingerprint, "tensorflow" in sys.modules, "tokenizers" in sys.modules)
"""


def test_a_kill_at_any_time_leaves_all_or_nothing(tmp_path):
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    for delay_s in (0.0, 0.15, 0.4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
    kept = load(Data(), tmp_path, quiet)
    assert len(kept.id) == 1408 and kept.edition == "clipart"
    # Another process, its own hash seed: the same bytes, without heavy imports.
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == (f"{kept.fingerprint} False False\n", "")
    fresh = [*command[:-1], str(tmp_path / "fresh")]
    out = subprocess.run(fresh, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == f"{kept.fingerprint} False True"
    assert out.stderr == ""


# --- the tokeniser --------------------------------------------------------------------


def test_the_tokeniser_depends_on_the_texts_and_not_on_their_order(tmp_path):
    texts = [f"The {a} sees a {b}" for a in ("lion", "lynx") for b in ("ship", "sheep")]
    one, two = text.train(texts, 120), text.train(texts[::-1], 120)
    assert one.to_str() == two.to_str() and one.get_vocab_size() <= 120
    one.save(str(tmp_path / "t.json"))
    again = text.encode(text.load(tmp_path / "t.json"), texts, 9)
    np.testing.assert_array_equal(again, text.encode(one, texts, 9))


def test_every_text_ends_with_the_end_token_and_is_cut_to_fit():
    tokenizer = text.train(["one two three four"] * 3, 200)
    tokens = text.encode(tokenizer, ["one two three four", "ONE", None, "\u4e16"], 4)
    assert tokens.shape == (4, 4) and tokens.dtype == np.int32
    assert tokens[0, 3] == text.END and (tokens[0] > 0).all()
    assert tokens[1, 1:].tolist() == [text.END, 0, 0]
    assert tokens[2].tolist() == [text.END, 0, 0, 0]
    assert tokens[3].tolist()[1:] == [text.UNKNOWN, text.END, 0]


def test_a_text_cannot_smuggle_in_special_tokens():
    tokenizer = text.train(["pad end [ ] words"] * 3, 200)
    tokens = text.encode(tokenizer, ["[PAD] [END] [UNK] words"], 30)[0]
    length = int((tokens != text.PAD).sum())
    assert (tokens[: length - 1] > text.END).sum() >= 8
    assert tokens[length - 1] == text.END and (tokens[:length] != text.PAD).all()
