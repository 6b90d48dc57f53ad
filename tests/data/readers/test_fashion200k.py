"""Fashion200k: rows of the label files, tasks, splits and titles."""

import re
import time

import numpy as np
import pytest

from ccu_jax.data.readers import fashion200k
from ccu_jax.data.readers.fashion200k import (
    CATEGORIES,
    SUB_CATEGORIES,
    clean_title,
    compile_class_words,
)
from ccu_jax.errors import UserError
from tests.data.readers.layouts import (
    encode_image,
    read_rows,
    write_fashion200k,
    write_files,
)

GOWN = "women/dresses/gowns/51234567/51234567"
SHIRT = "women/tops/t-shirts/5123456/5123456_1"


@pytest.fixture
def layout(tmp_path):
    return write_fashion200k(tmp_path)


def add_row(layout, path, title="red dress", name="dress_train", with_image=True):
    """Appends a row to a label file, with the image that it names."""
    line = f"{path}.jpeg\t-1.780000\t{title}\n"
    with (layout.root / "labels" / f"{name}_detect_all.txt").open("a") as file:
        file.write(line)
    if with_image:
        write_files(layout.root, {f"{path}.jpeg": encode_image()})


def test_fields_come_from_the_path_and_the_label_file(layout):
    add_row(layout, f"{GOWN}_3", "blue striped linen dress")
    add_row(layout, SHIRT, "white t-shirt top", name="top_test")
    add_row(layout, "women/dresses/gowns/0/0_8", name="dress_test")
    source, examples, counts = read_rows(layout.config(validation_fraction=0))
    gown, shirt = examples[f"{GOWN}_3"], examples[SHIRT]
    assert (gown.group, gown.labels, gown.split) == ("51234567", ("dress",), "train")
    assert (shirt.group, shirt.labels, shirt.split) == ("5123456", ("top",), "test")
    assert gown.text == "blue striped linen dress"
    assert source.classes == CATEGORIES
    # A product in two splits is noted, and stays one group.
    example = examples["women/dresses/gowns/0/0_8"]
    assert (example.split, example.group) == ("test", "0")
    assert counts == {"read": 9, "noted: product in two splits": 1}


def test_task_may_be_the_sub_category(layout):
    add_row(layout, SHIRT, name="top_train")
    add_row(layout, "women/dresses/capes/1/1_0")
    add_row(layout, "women/dresses/blouses/2/2_0")  # a sub-category of tops
    assert read_rows(layout.config()).counts == {"read": 9}
    source, examples, counts = read_rows(layout.config(task="sub_category"))
    assert counts == {"read": 9, "skipped: sub-category unknown": 2}
    assert examples[SHIRT].labels == ("t-shirts",)
    assert source.classes == sum(SUB_CATEGORIES.values(), ())
    assert len(set(source.classes)) == 31


FORM = "path is not of the known form"
COLUMNS = "row has the wrong number of columns"
NEW = "women/dresses/gowns/60000001/60000001_0.jpeg"
BAD_PATHS = [
    *("../../etc/passwd", "/etc/passwd", "women/dresses/../../1/1.jpeg"),
    *("women/dresses/gowns/1/../1.jpeg", "women\\dresses\\gowns\\1\\1_0.jpeg"),
    *(f"{NEW}/", f"{NEW} ", "women/dresses/gowns/1/1_0.png"),
    *("women/dresses/gowns/1/1\0_0.jpeg", "women/dresses/gowns/\u0661/1_0.jpeg"),
    *(f"women/dresses/gowns/1/{'1' * 300}.jpeg", "women/shoes/gowns/1/1_0.jpeg"),
]
BAD_ROWS = [
    (f"{NEW}\tred dress", COLUMNS),
    (f"{NEW}\t-1.0\tred\tdress", COLUMNS),
    ("red dress", COLUMNS),
    ("women/dresses/gowns/0/0_0.jpeg\t-1.0\tanother", "path listed twice"),
    *((f"{path}\t-1.0\tred dress", FORM) for path in BAD_PATHS),
    (
        "women/tops/shirts/1/1_0.jpeg\t-1.0\tred dress",
        "path is of another category than the label file",
    ),
]


@pytest.mark.parametrize("line, reason", BAD_ROWS, ids=lambda value: ascii(value)[:40])
def test_unusable_row_is_skipped(layout, line, reason):
    layout.list_file.write_text(layout.list_file.read_text() + line + "\n")
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 7, f"skipped: {reason}": 1}
    assert len(examples) == 6
    message = rf"dress_train_detect_all.txt line 6: {reason}"
    with pytest.raises(UserError, match=message):
        read_rows(layout.config(strict=True))


def test_unlisted_images_are_ignored_and_missing_files_are_an_error(layout, tmp_path):
    names = ("pants/leggings/3/3_0.jpeg", "readme.txt")
    write_files(layout.root / "women", dict.fromkeys(names, encode_image()))
    write_files(tmp_path / "elsewhere", {"0.jpeg": encode_image()})
    (layout.root / "women" / "link.jpeg").symlink_to(tmp_path / "elsewhere")
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 6, "ignored: image that no label file lists": 2}
    for path in layout.images.values():
        path.unlink()
    message = f"none of the images listed in labels/: .* see {fashion200k.PAGE}"
    with pytest.raises(UserError, match=message):
        read_rows(layout.config())
    (layout.root / "labels").rename(layout.root / "lists")
    with pytest.raises(UserError, match="lacks labels/.* and 7 more: unpack"):
        read_rows(layout.config())


def test_validation_takes_products_by_their_hash(layout):
    for product in range(10, 310):
        for view in (0, 2):
            path = f"women/dresses/gowns/{product}/{product}_{view}"
            add_row(layout, path, f"dress {product}")
    examples = read_rows(layout.config(validation_fraction=0.2)).examples
    splits: dict[str, set[str]] = {}
    for example in examples.values():
        splits.setdefault(example.group, set()).add(example.split)
    assert all(len(names) == 1 for names in splits.values())
    assert splits["5"] == {"test"}
    fraction = np.mean([names == {"validation"} for names in splits.values()])
    assert 0.13 < fraction < 0.27
    larger = read_rows(layout.config(validation_fraction=0.4)).examples
    for id_, example in examples.items():
        if example.split == "validation":
            assert larger[id_].split == "validation"
    # Other rows, and their order, do not matter.
    lines = layout.list_file.read_bytes().split(b"\n")
    layout.list_file.write_bytes(b"\n".join(lines[::-2]))
    fewer = read_rows(layout.config(validation_fraction=0.2)).examples
    assert all(example == examples[id_] for id_, example in fewer.items())


def test_titles_are_cleaned_by_the_settings(layout):
    add_row(layout, f"{GOWN}_0", "st. ives dress")
    add_row(layout, f"{GOWN}_1", "gown dress")
    settings = {"mask_category_words": True, "tirg_dot_token": True}
    _, examples, counts = read_rows(layout.config(**settings))
    assert examples[f"{GOWN}_0"].text == "stdotmark ives"
    assert examples[f"{GOWN}_1"].text == "gown"
    assert counts == {"read": 8}
    config = layout.config(task="sub_category", mask_category_words=True)
    _, examples, counts = read_rows(config)
    assert examples[f"{GOWN}_1"].text is None
    assert counts["noted: title with nothing but masked words"] == 1
    assert read_rows(layout.config()).examples[f"{GOWN}_0"].text == "st. ives dress"


CATEGORY_WORDS = compile_class_words(CATEGORIES)
NOT_ASCII = "noted: non-ASCII title"
DOUBLE_ENCODED = [
    ("brand\u00e2\u00ae dress", "brand\u00ae dress"),
    ("\u00e3\u0083\u00e2\u00a9t\u00e3\u00a9 dress", "\u00e9t\u00e9 dress"),
    ("c\u00e5\u0093ur dress", "c\u0153ur dress"),
]
CORRECT = ["caf\u00e9\u00ae dress", "ch\u00e2teau cr\u00eape dress"]
CORRECT += ["\u00e3 \u00e2 \u00e9\u2122", "\u00e5\u00ae"]


@pytest.mark.parametrize(
    "raw, title, notes",
    [
        *(
            (*pair, ["noted: doubly encoded title", NOT_ASCII])
            for pair in DOUBLE_ENCODED
        ),
        *((title, title, [NOT_ASCII]) for title in CORRECT),
        *(
            (f"red{c}linen", "red linen", ["noted: control characters in a title"])
            for c in "\u0085\u0099\0\x0b\x1c"
        ),
        ("st. ives & co? wrap* dress ", "st. ives & co? wrap* dress", []),
    ],
)
def test_title_is_repaired_and_noted(raw, title, notes):
    assert clean_title(raw) == (title, tuple(notes))


def test_every_doubly_encoded_character_is_fixed():
    characters = [chr(code) for code in range(0xA1, 0x100)]
    for character in [*characters, *"\u2018\u2019\u201c\u2122"]:
        for encoding in ("latin-1", "cp1252"):
            try:
                twice = f"a{character}b".encode().decode(encoding)
            except UnicodeDecodeError:  # not defined in cp1252
                continue
            assert clean_title(twice)[0] == f"a{character}b"
            if encoding == "latin-1":
                fixed, _ = clean_title(twice.lower())
                assert fixed.lower() == f"a{character.lower()}b"


def test_punctuation_becomes_words_for_tirg():
    title = "st. ives & co? wrap* dress "
    expected = "stdotmark ives andmark coquestionmark wrapstarmark dress"
    assert clean_title(title, tirg=True) == (expected, ())


@pytest.mark.parametrize(
    "title, masked",
    [
        ("black wrap dress", "black wrap"),
        ("black dresses and skirts", "black and"),
        ("Jacket: denim JACKETS", "denim"),
        ("women's pant. pants", "women's"),
        ("v-neck-top with the top's straps", "v-neck with the straps"),
        ("red sundress or sweatpants", "red or"),
        ("laptop stop topstitched", "laptop stop topstitched"),
        ("long-sleeved blouse", "long-sleeved blouse"),
    ],
)
def test_words_of_categories_are_masked(title, masked):
    assert clean_title(title, CATEGORY_WORDS)[0] == masked


def test_words_of_sub_categories_are_masked():
    names = [name for names in SUB_CATEGORIES.values() for name in names]
    words = {word for name in names for word in re.split("[_-]", name)} - {"and"}
    title = " ".join(["blue", *sorted(words), "long-sleeved-top gown tshirt linen"])
    pattern = compile_class_words([*CATEGORIES, *names])
    assert clean_title(title, pattern)[0] == "blue linen"


def test_title_without_other_words_is_no_text():
    notes = ("noted: title with nothing but masked words",)
    assert clean_title("dress", CATEGORY_WORDS, tirg=True) == (None, notes)
    assert clean_title(" ", CATEGORY_WORDS) == (None, ("noted: empty title",))


@pytest.mark.parametrize(
    "title", ["a" + "!" * 10**6 + "a-dress", "dress" * 200_000 + "x", "\u00c3" * 10**6]
)
def test_time_does_not_grow_with_the_square_of_the_length(title):
    start_s = time.process_time()
    clean_title(title, CATEGORY_WORDS, tirg=True)
    assert time.process_time() - start_s < 3
