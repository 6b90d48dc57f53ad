"""Fashion200k: rows of the label files, tasks and splits."""

import numpy as np
import pytest

from ccu_jax.data.readers import fashion200k
from ccu_jax.data.readers.fashion200k import CATEGORIES, SUB_CATEGORIES
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
    source, examples, _ = read_rows(layout.config(validation_fraction=0))
    gown, shirt = examples[f"{GOWN}_3"], examples[SHIRT]
    assert (gown.group, gown.labels, gown.split) == ("51234567", ("dress",), "train")
    assert (shirt.group, shirt.labels, shirt.split) == ("5123456", ("top",), "test")
    assert gown.text == "blue striped linen dress"
    assert source.classes == CATEGORIES


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


@pytest.mark.parametrize(
    "line, reason",
    [
        (f"{NEW}\tred dress", COLUMNS),
        (f"{NEW}\t-1.0\tred\tdress", COLUMNS),
        ("red dress", COLUMNS),
        ("women/dresses/gowns/0/0_0.jpeg\t-1.0\tanother", "path listed twice"),
        ("../../etc/passwd\t-1.0\tred dress", FORM),
        ("/etc/passwd\t-1.0\tred dress", FORM),
        ("women/dresses/../../1/1.jpeg\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/../1.jpeg\t-1.0\tred dress", FORM),
        ("women\\dresses\\gowns\\1\\1_0.jpeg\t-1.0\tred dress", FORM),
        (f"{NEW}/\t-1.0\tred dress", FORM),
        (f"{NEW} \t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1_0.png\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1\0_0.jpeg\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/\u0661/1_0.jpeg\t-1.0\tred dress", FORM),
        (f"women/dresses/gowns/1/{'1' * 300}.jpeg\t-1.0\tred dress", FORM),
        ("women/shoes/gowns/1/1_0.jpeg\t-1.0\tred dress", FORM),
        (
            "women/tops/shirts/1/1_0.jpeg\t-1.0\tred dress",
            "path is of another category than the label file",
        ),
    ],
)
def test_unusable_row_is_skipped(layout, line, reason):
    layout.list_file.write_text(layout.list_file.read_text() + line + "\n")
    _, examples, counts = read_rows(layout.config())
    assert counts == {"read": 7, f"skipped: {reason}": 1}
    assert len(examples) == 6
    message = rf"dress_train_detect_all.txt line 6: {reason}"
    with pytest.raises(UserError, match=message):
        read_rows(layout.config(strict=True))


def test_images_that_are_not_listed_are_ignored(layout):
    write_files(
        layout.root,
        {
            f"{GOWN}_9.jpeg": encode_image(),
            "women/pants/leggings/3/3_0.jpeg": encode_image(),
            "women/readme.txt": "not an image",
        },
    )
    counts = read_rows(layout.config()).counts
    assert counts == {"read": 6, "ignored: image that no label file lists": 2}


def test_release_without_any_listed_image_is_an_error(layout):
    for path in layout.images.values():
        path.unlink()
    message = f"none of the images that labels/ lists: .* see {fashion200k.PAGE}"
    with pytest.raises(UserError, match=message):
        read_rows(layout.config())


def test_each_missing_label_file_is_reported(layout):
    (layout.root / "labels" / "top_test_detect_all.txt").unlink()
    with pytest.raises(
        UserError, match="has no labels/top_test_detect_all.txt: unpack"
    ):
        read_rows(layout.config())
    (layout.root / "labels").rename(layout.root / "other")
    with pytest.raises(UserError, match="has no labels/.* and 7 more: unpack"):
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


def test_product_in_two_splits_is_noted_and_stays_one_group(layout):
    add_row(layout, "women/dresses/gowns/0/0_8", name="dress_test")
    _, examples, counts = read_rows(layout.config(validation_fraction=0))
    assert counts == {"read": 7, "noted: product in two splits": 1}
    other = examples["women/dresses/gowns/0/0_8"]
    assert (other.split, other.group) == ("test", "0")


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
