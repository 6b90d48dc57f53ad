"""Fashion200k: the reader on hand-written official files, and the sample edition."""

import concurrent.futures
import io
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from ccu_jax.config.schema import Data
from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.readers import fashion200k
from ccu_jax.data.readers import fashion200k_titles as fashion_titles
from ccu_jax.data.readers.base import MARKER, Counts, SkipExample
from ccu_jax.data.readers.fashion200k_labels import (
    CATEGORIES,
    FOLDERS,
    LABEL_FILES,
    SUB_CATEGORIES,
)
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

GOWN = "women/dresses/gowns/51234567/51234567"
SHIRT = "women/tops/t-shirts/5123456/5123456"
OFFICIAL = {
    "dress_test_detect_all.txt": (
        "women/dresses/gowns/58880001/58880001_0.jpeg\t-1.780000\tred long gown\n"
    ),
    "dress_train_detect_all.txt": (
        f"{GOWN}_0.jpeg\t-1.780000\tblue striped linen dress\n"
        f"{GOWN}_3.jpeg\t-0.120000\tblue striped linen dress\n"
        "women/dresses/mini_and_short_dresses/51234568/51234568_0.jpeg\t-0.900000\t"
        "multicolor short dress\n"
    ),
    "top_train_detect_all.txt": f"{SHIRT}_1.jpeg\t0.500000\twhite cotton t-shirt top\n",
}


def quiet(what, done, total):
    """A progress callback that says nothing."""


def picture(colour="navy", **options):
    file = io.BytesIO()
    Image.new("RGB", (30, 40), colour).save(file, "jpeg", **options)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """A tiny release in the official layout, every listed picture there."""
    root = tmp_path / "fashion-200k"
    (root / "labels").mkdir(parents=True)
    for name in LABEL_FILES:
        text = OFFICIAL.get(name, "")
        (root / "labels" / name).write_text(text, "utf-8", newline="\n")
        for line in text.splitlines():
            put(root, line.partition("\t")[0])
    return root


def put(root, path):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(picture())


def add(root, line, name="dress_train_detect_all.txt", draw=True):
    """Appends a line to a label file, with the picture it names."""
    line = line.encode() if isinstance(line, str) else line
    with (root / "labels" / name).open("ab") as file:
        file.write(line + b"\n")
    if draw:
        put(root, line.partition(b"\t")[0].decode())


def no_archive(path):
    raise AssertionError(f"there is nothing to unpack: {path}")


def opened(given, unpack=no_archive, **settings):
    """The source and its counts, before any row is read."""
    config = Data(dataset="fashion200k", dir=str(given), **settings)
    place = fashion200k.READER.locate(config, given)
    counts = Counts(str(given), config.strict)
    return fashion200k.READER.open(config, place, counts, unpack), counts


def read(given, unpack=no_archive, **settings):
    """All usable examples by id, and the counts."""
    source, counts = opened(given, unpack, **settings)
    examples = {}
    for key in source.keys:
        try:
            example = source.read(key)
        except SkipExample as reason:
            counts.skip(str(reason), source.row_name(key))
            continue
        for note in example.notes:
            counts.add(note)
        assert example.id not in examples
        examples[example.id] = example
    return examples, counts.numbers


# --- official files -------------------------------------------------------------------


def test_rows_are_read_as_the_official_files_have_them(root):
    examples, counts = read(root, validation_fraction=0.0)
    assert counts == {"read": 5}
    assert list(examples) == [
        "women/dresses/gowns/58880001/58880001_0",
        f"{GOWN}_0",
        f"{GOWN}_3",
        "women/dresses/mini_and_short_dresses/51234568/51234568_0",
        f"{SHIRT}_1",
    ]
    first, shirt = examples[f"{GOWN}_3"], examples[f"{SHIRT}_1"]
    assert first.image == picture() and first.text == "blue striped linen dress"
    assert (first.group, first.labels, first.split) == ("51234567", ("dress",), "train")
    assert (shirt.group, shirt.labels, shirt.notes) == ("5123456", ("top",), ())
    assert [e.split for e in examples.values()] == ["test"] + 4 * ["train"]
    source, _ = opened(root)
    assert source.classes == CATEGORIES and source.metric == "accuracy"
    assert not source.multi_label


def test_sub_categories_are_the_31_of_the_paths(root):
    source, _ = opened(root, task="sub_category")
    assert len(set(source.classes)) == 31
    examples, _ = read(root, task="sub_category")
    assert examples[f"{GOWN}_0"].labels == ("gowns",)
    assert examples[f"{SHIRT}_1"].labels == ("t-shirts",)
    assert {e.labels[0] for e in examples.values()} <= set(source.classes)
    with pytest.raises(UserError, match="neither 'category' nor 'sub_category'"):
        read(root, task="colour")


def test_an_unknown_sub_category_is_left_out_of_that_task_alone(root):
    add(root, "women/dresses/capes/1/1_0.jpeg\t-1.000000\tred dress")
    add(root, "women/dresses/blouses/2/2_0.jpeg\t-1.000000\tred dress")
    examples, counts = read(root, task="sub_category")
    assert counts == {"read": 7, "skipped: sub-category unknown": 2}
    examples, counts = read(root)
    assert counts == {"read": 7} and len(examples) == 7


def test_the_root_is_found_from_above_at_and_below(root):
    for given in (root.parent, root, root / "labels", root / "women"):
        assert len(read(given)[0]) == 5
    root.rename(root.parent / "fashion200k")
    assert len(read(root.parent)[0]) == 5


def test_what_is_missing_is_named_with_the_official_page(root, tmp_path):
    def refused(message, given=root):
        with pytest.raises(UserError, match=message) as error:
            read(given)
        assert fashion200k.PAGE in str(error.value) and "\n" not in str(error.value)

    refused("no folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no Fashion200k in .* missing labels/.* and 8 more", tmp_path / "empty")
    (root / "women").rename(tmp_path / "away")
    refused("has no women/ or women.tar.gz")
    (root / "women").mkdir()
    refused("has none of the images that labels/ lists")
    (root / "labels" / "top_test_detect_all.txt").unlink()
    refused("has no labels/top_test_detect_all.txt")
    (root / "labels").rename(tmp_path / "labels")
    refused("has no labels/.* and 7 more")


def test_pictures_may_still_be_in_their_archive(root, tmp_path):
    with tarfile.open(root / "women.tar.gz", "w:gz") as archive:
        archive.add(root / "women", "women")
    assert "noted: images in women.tar.gz" not in read(root)[1]
    (root / "women").rename(tmp_path / "women")
    (root / "women").mkdir()  # an empty folder is no reason to leave the archive
    asked = []

    def unpack(path):
        asked.append(path)
        return tmp_path

    examples, counts = read(root, unpack)
    assert asked == [root / "women.tar.gz"] and len(examples) == 5
    assert counts == {"read": 5, "noted: images in women.tar.gz": 1}
    assert len(read(root, lambda path: tmp_path / "women")[0]) == 5


def test_the_signature_changes_with_labels_and_folders(root):
    def signature():
        config = Data(dataset="fashion200k", dir=str(root))
        place = fashion200k.READER.locate(config, root)
        return fashion200k.READER.signature(config, place)

    first = signature()
    assert signature() == first
    add(root, f"{GOWN}_5.jpeg\t-1.000000\tblue striped linen dress", draw=False)
    second = signature()
    put(root, "women/pants/leggings/3/3_0.jpeg")
    assert len({first, second, signature()}) == 3


# --- rows that cannot be used ---------------------------------------------------------

NEW = "women/dresses/gowns/60000001/60000001_0.jpeg"
FORM = "path is not of the known form"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{NEW}\tred dress", "row has the wrong number of columns"),
        (f"{NEW}\t-1.0\tred\tdress", "row has the wrong number of columns"),
        ("red dress", "row has the wrong number of columns"),
        (f"{GOWN}_0.jpeg\t-1.0\tanother dress", "path listed twice"),
        ("../../etc/passwd\t-1.0\tred dress", FORM),
        ("/etc/passwd\t-1.0\tred dress", FORM),
        ("women/dresses/../../1/1.jpeg\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/../1.jpeg\t-1.0\tred dress", FORM),
        ("women\\dresses\\gowns\\1\\1_0.jpeg\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1_0.jpeg/\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1_0.png\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1_0.jpeg\n".strip() + " \t-1.0\tred dress", FORM),
        ("women/dresses/gowns/1/1\0_0.jpeg\t-1.0\tred dress", FORM),
        ("women/dresses/gowns/\u0661/1_0.jpeg\t-1.0\tred dress", FORM),
        (f"women/dresses/gowns/1/{'1' * 300}.jpeg\t-1.0\tred dress", FORM),
        (f"women/shoes/gowns/1/1_0.jpeg\t-1.0\tred {'dress'}", FORM),
        (
            "women/tops/shirts/1/1_0.jpeg\t-1.0\tred dress",
            "path is of another category than the label file",
        ),
        (NEW.encode() + b"\t-1.0\tcaf\xe9 dress", "line is not UTF-8"),
        (NEW.encode() + b"\t-1.0\t" + b"red " * (1 << 18) + b"dress", "line too long"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_and_the_next_one_is_read(
    root, line, reason
):
    add(root, line, draw=False)
    add(root, f"{GOWN}_7.jpeg\t-1.000000\tthe next dress")
    examples, counts = read(root)
    assert counts == {"read": 7, f"skipped: {reason}": 1}
    assert examples[f"{GOWN}_7"].text == "the next dress" and len(examples) == 6
    with pytest.raises(
        UserError, match=rf"dress_train_detect_all.txt line 4: {reason}"
    ):
        read(root, strict=True)


def test_whatever_bytes_a_label_file_holds_each_row_is_used_or_counted(root):
    path = root / "labels" / "dress_train_detect_all.txt"
    good = path.read_bytes()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        data = bytearray(good)
        for _ in range(rng.integers(1, 30)):
            place = int(rng.integers(len(data)))
            size = int(rng.integers(3))
            junk = rng.choice([0, 9, 10, 13, 46, 47, 92, 133, 194, 226, 255], size)
            data[place : place + int(rng.integers(3))] = bytes(junk.tolist())
        path.write_bytes(data)
        examples, counts = read(root, mask_category_words=True, tirg_dot_token=True)
        skipped = sum(n for name, n in counts.items() if name.startswith("skipped"))
        assert counts["read"] == len(examples) + skipped, seed
        assert all(re.fullmatch("[0-9]+", e.group) for e in examples.values()), seed


def test_blank_lines_and_windows_ends_of_lines_do_no_harm(root):
    path = root / "labels" / "dress_train_detect_all.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    examples, counts = read(root)
    assert counts == {"read": 5}
    assert examples[f"{GOWN}_0"].text == "blue striped linen dress"
    path.write_bytes(path.read_bytes().rstrip())
    assert read(root)[1] == {"read": 5}


def test_pictures_that_cannot_be_read_are_counted_and_none_is_read_elsewhere(
    root, tmp_path
):
    secret = tmp_path / "secret.jpeg"
    secret.write_bytes(picture())
    (root / f"{GOWN}_0.jpeg").unlink()
    (root / f"{GOWN}_3.jpeg").unlink()
    (root / f"{GOWN}_3.jpeg").symlink_to(secret)
    (root / f"{SHIRT}_1.jpeg").unlink()
    (root / f"{SHIRT}_1.jpeg").mkdir()
    put(root, f"{GOWN}_9.jpeg")
    put(root, "women/pants/leggings/3/3_0.jpeg")
    (root / "women" / "readme.txt").write_text("not an image")
    examples, counts = read(root)
    assert len(examples) == 2
    assert counts == {
        "read": 5,
        "ignored: image that no label file lists": 2,
        "skipped: image missing": 1,
        "skipped: image outside of the folder": 1,
        "skipped: image is no plain file": 1,
    }
    (root / "women").rename(tmp_path / "away")
    (root / "women").symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match="is a link out of its folder"):
        read(root)


# --- splits ---------------------------------------------------------------------------


def test_validation_takes_whole_products_whatever_else_is_listed(root):
    for product in range(1, 301):
        for view in (0, 2):
            path = f"women/dresses/gowns/{product}/{product}_{view}.jpeg"
            add(root, f"{path}\t-1.000000\tdress {product}")
    splits: dict[str, set[str]] = {}
    before, _ = read(root, validation_fraction=0.2)
    for example in before.values():
        splits.setdefault(example.group, set()).add(example.split)
    assert all(len(found) == 1 for found in splits.values())
    share = np.mean([found == {"validation"} for found in splits.values()])
    assert 0.13 < share < 0.27
    assert splits["58880001"] == {"test"}
    larger, _ = read(
        root, validation_fraction=0.4
    )  # a larger share holds the smaller one
    assert all(
        larger[i].split == "validation"
        for i, example in before.items()
        if example.split == "validation"
    )
    lines = (root / "labels" / "dress_train_detect_all.txt").read_bytes().split(b"\n")
    (root / "labels" / "dress_train_detect_all.txt").write_bytes(
        b"\n".join(lines[::-2])
    )
    for i, example in read(root, validation_fraction=0.2)[0].items():
        assert example == before[i]


def test_a_product_in_two_splits_stays_one_group(root):
    add(root, f"{GOWN}_8.jpeg\t-1.0\tblue dress", "dress_test_detect_all.txt")
    examples, counts = read(root, validation_fraction=0.0)
    assert counts == {"read": 6, "noted: product in two splits": 1}
    assert examples[f"{GOWN}_8"].split == "test"
    assert examples[f"{GOWN}_8"].group == examples[f"{GOWN}_0"].group


# --- titles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "mended"),
    [
        ("women\u00e2\u0080\u0099s dress", "women\u2019s dress"),
        ("women\u00e2\u20ac\u2122s dress", "women\u2019s dress"),
        ("boucl\u00c3\u00a9 dress", "boucl\u00e9 dress"),
        ("boucl\u00e3\u00a9 dress", "boucl\u00e9 dress"),
        ("brand\u00e2\u0084\u00a2 dress", "brand\u2122 dress"),
        ("brand\u00e2\u00ae dress", "brand\u00ae dress"),
        ("\u00e3\u0083\u00e2\u00a9t\u00e3\u00a9 dress", "\u00e9t\u00e9 dress"),
        ("c\u00e5\u0093ur dress", "c\u0153ur dress"),
    ],
)
def test_doubly_encoded_titles_are_mended_and_noted(root, raw, mended):
    add(root, f"{NEW}\t-1.000000\t{raw}")
    examples, counts = read(root)
    assert examples[NEW.removesuffix(".jpeg")].text == mended
    assert counts == {
        "read": 6,
        "noted: doubly encoded title": 1,
        "noted: non-ASCII title": 1,
    }


def test_every_character_that_was_encoded_twice_comes_back():
    once = [chr(code) for code in range(0xA1, 0x100)] + list("\u2018\u2019\u201c\u2122")
    for character in once:
        for encoding in ("latin-1", "cp1252"):
            try:
                twice = f"a{character}b".encode().decode(encoding)
            except UnicodeDecodeError:  # what cp1252 has nothing for
                continue
            assert fashion_titles.fix_double_encoding(twice) == f"a{character}b"
            lower = f"a{character.lower()}b"
            if encoding == "latin-1":
                assert (
                    fashion_titles.fix_double_encoding(twice.lower()).lower() == lower
                )


@pytest.mark.parametrize(
    "title",
    [
        "caf\u00e9\u00ae dress",
        "ch\u00e2teau cr\u00eape dress",
        "\u00e3 \u00e2 \u00e9\u2122",
        "\u00e5\u00ae",
        "plain dress",
    ],
)
def test_titles_that_were_encoded_once_stay_as_they_are(title):
    expected = () if title.isascii() else ("noted: non-ASCII title",)
    assert fashion_titles.clean_title(title) == (title, expected)


@pytest.mark.parametrize("character", ["\u0085", "\u0099", "\0", "\x0b", "\x1c"])
def test_control_characters_end_no_line_and_become_spaces(root, character):
    add(root, f"{NEW}\t-1.000000\tred{character}linen dress")
    examples, counts = read(root)
    assert examples[NEW.removesuffix(".jpeg")].text == "red linen dress"
    assert counts == {"read": 6, "noted: control characters in a title": 1}


def test_tirg_words_are_an_option(root):
    add(root, f"{NEW}\t-1.000000\tst. ives & co? wrap* dress ")
    name = NEW.removesuffix(".jpeg")
    assert read(root)[0][name].text == "st. ives & co? wrap* dress"
    tirg = "stdotmark ives andmark coquestionmark wrapstarmark dress"
    assert read(root, tirg_dot_token=True)[0][name].text == tirg


@pytest.mark.parametrize(
    ("title", "left"),
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
def test_titles_do_not_name_the_category_when_masked(root, title, left):
    add(root, f"{NEW}\t-1.000000\t{title}")
    name = NEW.removesuffix(".jpeg")
    assert read(root, mask_category_words=True)[0][name].text == left
    assert read(root)[0][name].text == title


def test_titles_do_not_name_the_sub_category_when_masked(root):
    names = [name for names in SUB_CATEGORIES.values() for name in names]
    words = {w for name in names for w in re.split("[_-]", name)} - {"and"}
    title = " ".join(["blue", *sorted(words), "long-sleeved-top", "gown", "tshirt"])
    add(root, f"{NEW}\t-1.000000\t{title} linen")
    settings = {"task": "sub_category", "mask_category_words": True}
    text = read(root, **settings)[0][NEW.removesuffix(".jpeg")].text
    assert text == "blue linen"


def test_a_title_of_nothing_but_masked_words_is_no_text(root):
    add(root, f"{NEW}\t-1.000000\tdress")
    add(root, f"{GOWN}_8.jpeg\t-1.000000\t ")
    examples, counts = read(root, mask_category_words=True, tirg_dot_token=True)
    assert examples[NEW.removesuffix(".jpeg")].text is None
    assert examples[f"{GOWN}_8"].text is None
    assert counts == {
        "read": 7,
        "noted: title with nothing but masked words": 1,
        "noted: empty title": 1,
    }


# --- size and threads -----------------------------------------------------------------


def test_threads_may_read_at_once_and_in_any_order(root):
    for n in range(50):
        path = f"women/dresses/gowns/{n}/{n}_0.jpeg"
        add(root, f"{path}\t-1.000000\tdress {n}")
        (root / path).write_bytes(str(n).encode())
    source, counts = opened(root)
    alone = [source.read(key) for key in source.keys]
    before = dict(counts.numbers)
    order = np.random.default_rng(0).integers(len(source.keys), size=1000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda n: source.read(source.keys[n]), order))
    assert together == [alone[n] for n in order]
    assert counts.numbers == before


# --- the sample edition ---------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sample edition of 800 pictures; not to be changed."""
    root = tmp_path_factory.mktemp("sample") / "fashion200k"
    editions.ensure("fashion200k", root, 800, 5, quiet)
    return root


def rows_of(root):
    """(label file, path, score, title) of each line."""
    for name in LABEL_FILES:
        text = (root / "labels" / name).read_bytes().decode("ascii")
        assert text.endswith("\n") and "\r" not in text
        for line in text.split("\n")[:-1]:
            yield name, *line.split("\t")


def test_the_sample_edition_has_the_official_layout(written):
    names = {"labels", "women", MARKER}
    assert {path.name for path in written.iterdir()} == names
    assert {path.name for path in (written / "labels").iterdir()} == set(LABEL_FILES)
    rows = list(rows_of(written))
    assert len(rows) == 800 == len(set(path for _, path, _, _ in rows))
    titles, files, subs, gaps = {}, {}, set(), 0
    for name, path, score, title in rows:
        _, plural, sub, product, file = path.split("/")
        category, _ = LABEL_FILES[name]
        assert FOLDERS[plural] == category and sub in SUB_CATEGORIES[category]
        assert re.fullmatch(rf"{product}_[0-9]\.jpeg", file)
        assert re.fullmatch("[0-9]{7,8}", product)
        assert re.fullmatch(r"-[0-9]+\.[0-9]{6}", score)
        assert title == title.lower() and len(title) <= 76
        assert 3 <= len(title.split()) <= 11
        titles.setdefault(product, set()).add(title)
        files.setdefault(product, {}).setdefault(name, []).append(int(file[-6]))
        subs.add(sub)
        with Image.open(written / path) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert all(60 <= side <= 100 for side in image.size)
    assert all(len(found) == 1 for found in titles.values())
    assert all(len(found) == 1 for found in files.values())
    for found in files.values():
        (views,) = found.values()
        assert views == sorted(set(views)) and 1 <= len(views) <= 5
        gaps += views != list(range(len(views)))
    assert 0 < gaps < len(files) and len(subs) >= 28
    assert max(len(v) for found in files.values() for v in found.values()) == 5


def test_the_sample_has_the_official_shares(written):
    sizes = dict.fromkeys(LABEL_FILES, 0)
    named = {category: [] for category in CATEGORIES}
    for name, _, _, title in rows_of(written):
        sizes[name] += 1
        category = LABEL_FILES[name][0]
        named[category].append(category in title.split())
    shares = {"dress": 59.1, "jacket": 27.1, "pants": 31.6, "skirt": 35.1, "top": 48.8}
    for category, share in shares.items():
        test, train = (
            sizes[f"{category}_{s}_detect_all.txt"] for s in ("test", "train")
        )
        assert abs((test + train) / 800 - share / 201.7) < 0.01
        assert (
            abs(test / (test + train) - (0.1 if category == "dress" else 0.165)) < 0.03
        )
    assert np.mean(named["dress"]) > np.mean(named["pants"]) > 0.6


def test_progress_is_told_for_each_picture(tmp_path):
    told = []
    editions.ensure("fashion200k", tmp_path / "s", 200, 0, lambda *x: told.append(x))
    assert [done for _, done, total in told if total == 200][:200] == list(range(200))


def test_a_folder_that_the_user_names_is_never_replaced(written, tmp_path):
    shutil.copytree(written / "labels", tmp_path / "labels")
    (tmp_path / "labels" / "top_test_detect_all.txt").unlink()
    given = Data(dataset="fashion200k", dir=str(tmp_path))
    with pytest.raises(UserError, match="has no labels/top_test_detect_all.txt"):
        fashion200k.READER.locate(given, tmp_path)


@pytest.fixture(scope="module")
def decoded(written):
    """Examples of the sample without the nouns of categories, and their pictures."""
    examples, counts = read(written, mask_category_words=True, validation_fraction=0.0)
    assert counts == {"read": 800}
    examples = list(examples.values())
    squares = [pictures.decode(example.image, 48).pixels for example in examples]
    return examples, np.stack(squares)


def accuracy(features, labels, train):
    """Test accuracy of ridge regression to one-hot labels."""
    mean, spread = features[train].mean(0), features[train].std(0) + 1e-3
    x = (features - mean) / spread
    x = x / np.sqrt(x.shape[1])
    y = np.eye(len(CATEGORIES))[labels]
    w = np.linalg.solve(
        x[train].T @ x[train] + 2 * np.eye(x.shape[1]), x[train].T @ y[train]
    )
    return np.mean((x @ w).argmax(1)[~train] == labels[~train])


def test_titles_and_pictures_of_the_sample_both_tell_something(decoded):
    examples, squares = decoded
    labels = np.array([CATEGORIES.index(example.labels[0]) for example in examples])
    # Products in turn, so that there are more to test on than in the small test split.
    _, group = np.unique([example.group for example in examples], return_inverse=True)
    train = group % 3 > 0
    words = sorted({word for example in examples for word in example.text.split()})
    bags = np.array(
        [[word in e.text.split() for word in words] for e in examples], float
    )
    grey = squares.mean(axis=3) / 255
    edges = [np.abs(np.diff(grey, axis=axis))[:, :47, :47] for axis in (1, 2)]
    pooled = [
        np.pad(e, ((0, 0), (0, 1), (0, 1))).reshape(-1, 8, 6, 8, 6) for e in edges
    ]
    shapes = np.sqrt(np.concatenate([p.mean((2, 4)) for p in pooled], 1))
    majority = max(np.mean(labels[~train] == label) for label in range(5))
    by_words = accuracy(bags, labels, train)
    by_shapes = accuracy(shapes.reshape(len(shapes), -1), labels, train)
    assert 0.9 > by_words > majority + 0.1
    assert 0.9 > by_shapes > majority + 0.15


def test_no_two_pictures_of_the_sample_are_nearly_the_same(decoded, tmp_path):
    _, squares = decoded
    np.save(tmp_path / "image.npy", squares)
    told = np.ones(len(squares), bool)
    clusters = duplicates.find_clusters(tmp_path / "image.npy", told, quiet)
    assert (clusters == np.arange(len(squares))).all()
