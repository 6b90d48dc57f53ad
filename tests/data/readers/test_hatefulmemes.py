"""Hateful Memes: rows of both phases, splits and labels. All content is invented."""

import json

import pytest

from ccu_jax.data.readers.base import MARKER
from ccu_jax.data.readers.hatefulmemes import READER
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    Layout,
    dump_lines,
    encode_image,
    meme,
    read_rows,
    write_files,
    write_hatefulmemes,
)


def first_phase(number, label=None):
    """A line of the first phase; without a label the field is absent."""
    field = "" if label is None else f'"label":{label},'
    image = f"img\\/{number:05d}.png"
    return f'{{"id":{number},"img":"{image}",{field}"text":"a thing {number}"}}'


@pytest.fixture
def write_lists(tmp_path):
    """Writes lists of memes (or lines) and their images."""

    def run(**lists):
        root, files = tmp_path / "lists", {}
        for name, rows in lists.items():
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            files[f"{name}.jsonl"] = "".join(line + "\n" for line in lines)
            files |= {json.loads(line)["img"]: encode_image() for line in lines}
        write_files(root, files)
        return Layout("hatefulmemes", root, root / "train.jsonl", {})

    return run


@pytest.fixture
def layout(tmp_path):
    return write_hatefulmemes(tmp_path)


@pytest.fixture
def append(layout):
    """Appends rows to a list of the layout, and writes their images."""

    def run(*rows, name="train"):
        with (layout.root / f"{name}.jsonl").open("ab") as file:
            file.write(dump_lines([*rows]))
        images = [r["img"] for r in rows if str(r["img"]).startswith("img/0")]
        write_files(layout.root, dict.fromkeys(images, encode_image()))

    return run


def ids_by_split(config):
    examples = read_rows(config).examples.values()
    return {
        split: sorted(e.id for e in examples if e.split == split)
        for split in ("train", "validation", "test")
    }


def test_both_phases_give_the_same_rows(write_lists):
    lists = {"train": [1235, 64322], "dev": [2, 3], "test": [4]}
    layouts = []
    for num_zeros, row in ((4, lambda n: first_phase(n, n % 2)), (0, meme)):
        rows = {split: [row(n) for n in numbers] for split, numbers in lists.items()}
        _, examples, counts = read_rows(write_lists(**rows).config())
        layouts.append({i: e._replace(notes=()) for i, e in examples.items()})
        assert counts.pop("noted: id without its leading zeros", 0) == num_zeros
        assert counts == {"read": 5}
    assert layouts[0] == layouts[1]
    example = layouts[0]["01235"]
    assert (example.group, example.labels) == ("01235", ("hateful",))
    assert layouts[0]["00004"].labels == ("not-hateful",)


def test_second_phase_takes_precedence_over_the_first(write_lists):
    layout = write_lists(
        train=[meme(1), meme(2)],
        dev_seen=[meme(21), meme(22), meme(23)],
        dev_unseen=[meme(23), meme(24)],
        dev=[first_phase(21, 1), first_phase(22, 0), first_phase(23, 0)],
        test_seen=[meme(31)],
        test_unseen=[meme(41)],
        test=[first_phase(31), first_phase(41, 0), first_phase(50, 1)],
    )
    _, examples, counts = read_rows(layout.config())
    assert ids_by_split(layout.config()) == {
        "train": ["00001", "00002"],
        "validation": ["00021", "00022", "00023", "00024"],
        "test": ["00031", "00041", "00050"],
    }
    assert examples["00023"].labels == examples["00041"].labels == ("hateful",)
    assert counts == {
        "read": 10,
        "noted: id in two dev files": 4,
        "noted: label differs in two dev files": 1,
        "noted: id in two test files": 1,
        "noted: label differs in two test files": 1,
        "noted: id without its leading zeros": 1,
        "skipped: no label": 1,
    }


def test_dev_files_are_the_test_split_if_no_test_file_has_labels(write_lists):
    train = [meme(n) for n in range(10_000, 10_200)]
    layout = write_lists(
        train=train,
        dev=[meme(20_001), meme(20_002)],
        test=[first_phase(30_001), first_phase(30_002)],
    )
    config = layout.config(validation_fraction=0.25)
    counts, splits = read_rows(config).counts, ids_by_split(config)
    assert splits["test"] == ["20001", "20002"]
    assert 30 < len(splits["validation"]) < 70
    assert len(splits["validation"]) + len(splits["train"]) == 200
    assert counts["skipped: no label"] == 2
    assert counts["noted: no labelled test file: the dev files are the test set"] == 1
    # Validation rows are chosen by a hash of the id alone.
    layout.list_file.write_bytes(dump_lines(train[50:]))
    fewer = ids_by_split(config)
    removed = {f"{n}" for n in range(10_000, 10_050)}
    assert set(fewer["validation"]) == set(splits["validation"]) - removed
    more = ids_by_split(layout.config(validation_fraction=0.5))
    assert set(fewer["validation"]) < set(more["validation"])


def test_missing_lists_are_replaced_or_an_error(layout, append):
    append(*[meme(n) for n in range(10, 60)])
    config = layout.config(validation_fraction=0.5)
    (layout.root / "dev_seen.jsonl").unlink()
    counts = read_rows(config).counts
    assert counts["noted: no labelled dev file: validation is a part of train"] == 1
    assert 10 < len(ids_by_split(config)["validation"]) < 45
    (layout.root / "test_seen.jsonl").unlink()
    with pytest.raises(
        UserError, match="no test rows; add one of these files, with labels"
    ):
        read_rows(config)


def test_empty_training_list_is_an_error(layout):
    layout.list_file.write_bytes(b"")
    with pytest.raises(UserError, match="no usable row left"):
        read_rows(layout.config())


def test_repeated_ids_are_skipped_and_a_missing_newline_is_noted(layout, append):
    append(meme(1))
    append(meme(2), meme(4), meme(5), name="test_seen")
    layout.list_file.write_bytes(layout.list_file.read_bytes().rstrip())
    assert read_rows(layout.config()).counts == {
        "read": 10,
        "noted: file without final newline": 1,
        "skipped: id listed twice": 2,
        "skipped: id is in the train split too": 1,
        "skipped: id is in the dev split too": 1,
    }


def test_texts_with_both_labels_are_counted_in_train_alone(write_lists):
    texts = {1: "a", 2: "both", 3: "both", 4: "both", 6: "b", 8: "b"}
    layout = write_lists(
        train=[meme(n, text=text) for n, text in texts.items()],
        dev_seen=[meme(10, text="a"), meme(11, text="c"), meme(12, text="c")],
        test_seen=[meme(20, text="d"), meme(21, text="d")],
    )
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 11, "noted: text with both labels": 1}


NO_TEXT, NOT_ASCII = "noted: row without text", "noted: non-ASCII text"
NUL, BROKEN = "noted: NUL characters in a text", "noted: broken characters in a text"
NO_ZEROS, OTHER_ID = (
    "noted: id without its leading zeros",
    "noted: id is not the image's",
)
GOOD_FIELDS = [
    *(({"label": label}, {"labels": ("hateful",)}) for label in (1, True, "1")),
    *(({"label": label}, {"labels": ("not-hateful",)}) for label in (0, False, "0")),
    *(({"text": t}, {"text": None, "notes": (NO_TEXT,)}) for t in (None, "", " \n", 7)),
    ({"text": "caf\u00e9"}, {"text": "caf\u00e9", "notes": (NOT_ASCII,)}),
    ({"text": "a\0b"}, {"text": "a b", "notes": (NUL,)}),
    ({"text": "\0"}, {"text": None, "notes": (NUL, NO_TEXT)}),
    ({"text": "\ud800"}, {"text": "\ufffd", "notes": (BROKEN, NOT_ASCII)}),
    ({"text": "x\u0085y"}, {"text": "x\u0085y", "notes": (NOT_ASCII,)}),
    ({"id": "00007"}, {"notes": ()}),
    *(({"id": id_}, {"notes": (NO_ZEROS,)}) for id_ in (7, "7")),
    *(({"id": id_}, {"notes": (OTHER_ID,)}) for id_ in (None, 8, True, [1], 7.0)),
]


@pytest.mark.parametrize("fields, expected", GOOD_FIELDS, ids=lambda v: ascii(v)[:40])
def test_fields_are_converted_and_noted(layout, append, fields, expected):
    append(meme(7, **fields))
    example = read_rows(layout.config()).examples["00007"]
    assert {name: getattr(example, name) for name in expected} == expected


BAD_IMAGES = [
    *("img/../secret.png", "../secret.png", "/secret.png", "img//secret.png"),
    *("img/sub/secret.png", "img\\..\\secret.png", "img/..\\secret.png"),
    *("img/..", "img/.", "img/", "img/a\nb.png", "img/a\0.png", "img/\ud800.png"),
    *("secret.png", "", 7, ["img/1.png"], None, "img/# a.png", "img/ a.png"),
]
MISSING_IMAGES = [f"img/{name}.png" for name in ("a" * 5000, "..secret", "%2e%2e")]
WRONG_LABELS = (2, "x", "", [1], {}, 0.5, float("nan"))
BAD_FIELDS = [
    *(({"label": label}, "no label") for label in (None, -1, "-1", ...)),
    *(({"label": label}, "label is neither 0 nor 1") for label in WRONG_LABELS),
    *(({"img": image}, "img is no path below img/") for image in BAD_IMAGES),
    *(({"img": image}, "image missing") for image in MISSING_IMAGES),
    ({"img": "img/C:secret.png"}, "image outside of the folder"),
]


@pytest.mark.parametrize("fields, reason", BAD_FIELDS, ids=lambda v: ascii(v)[:40])
def test_unusable_row_is_skipped(layout, append, fields, reason):
    root = layout.root
    for folder in (root.parent, root, root / "img", root / "img" / "sub"):
        write_files(folder, {"secret.png": encode_image()})
    row = {n: value for n, value in meme(7, **fields).items() if value is not ...}
    append(row)
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 7, f"skipped: {reason}": 1}
    assert examples.keys() == layout.images.keys()


def test_release_is_found_in_a_subfolder_of_any_name(layout, tmp_path):
    (tmp_path / "downloads").mkdir()
    layout.root.rename(tmp_path / "downloads" / "memes")
    config = layout._replace(root=tmp_path / "downloads").config()
    assert len(read_rows(config).examples) == 6
    write_hatefulmemes(tmp_path / "downloads" / "second release")
    with pytest.raises(UserError, match="several copies of .* such as .*/memes or .*/"):
        read_rows(config)


def test_marker_of_the_sample_edition_lies_above_the_lists(layout, tmp_path):
    (layout.root.parent / MARKER).write_text("")
    assert READER.locate(layout.config(), tmp_path).edition == "sample"
