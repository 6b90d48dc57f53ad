r"""Fashion200k (Han et al., 2017) in its official layout: clothes and their titles.

    labels/<category>_<train or test>_detect_all.txt    path \t score \t title
    women/<category>s/<sub-category>/<product>/<product>_<n>.jpeg     or women.tar.gz

Get it from https://github.com/xthan/fashion-200k ; this module downloads nothing.
"""

import os
import pathlib

from ccu_jax.config.schema import Data
from ccu_jax.data.readers.base import (
    Counts,
    Example,
    Location,
    Reader,
    Source,
    Unpack,
    hash_fraction,
)
from ccu_jax.data.readers.fashion200k_labels import (
    CATEGORIES,
    LABEL_FILES,
    SUB_CATEGORIES,
    Row,
    read_rows,
)
from ccu_jax.data.readers.fashion200k_titles import clean_title, compile_class_words
from ccu_jax.data.readers.releases import Release, find_images, unpack_images
from ccu_jax.data.readers.untrusted_files import Folder
from ccu_jax.errors import UserError

PAGE = "https://github.com/xthan/fashion-200k"
ARCHIVE = "women.tar.gz"
_LISTS = tuple(f"labels/{name}" for name in LABEL_FILES)


def open_fashion200k(
    config: Data, location: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Reads the label files; raises UserError if none of the listed images exists."""
    root, is_sub_task = location.root, config.task == "sub_category"
    images = find_images(root, "women", (ARCHIVE,))
    images = unpack_images(images, counts, unpack, "women")
    rows, listed = read_rows(root / "labels", counts, is_sub_task)
    products = {"train": set(), "test": set()}
    for row in rows:
        products[row.split].add(row.product)
    in_both = products["train"] & products["test"]
    counts.add("noted: product in two splits", len(in_both))
    any_listed, num_unlisted = _search_images(images, listed)
    if listed and not any_listed:
        raise UserError(
            f"data.dir: {root} has none of the images that labels/ lists: unpack "
            f"{ARCHIVE} there, see {PAGE}"
        )
    counts.add("ignored: image that no label file lists", num_unlisted)
    folder, classes, masked_words = Folder(images), CATEGORIES, None
    if is_sub_task:
        classes = tuple(name for names in SUB_CATEGORIES.values() for name in names)
    if config.mask_category_words:
        masked_words = compile_class_words({*CATEGORIES, *classes})

    def read(row: Row) -> Example:
        image = folder.read(row.path.removeprefix("women/"), "image")
        title, notes = clean_title(row.title, masked_words, config.tirg_dot_token)
        fraction = hash_fraction("validation", row.product)
        is_validation = row.split == "train" and fraction < config.validation_fraction
        return Example(
            row.path.removesuffix(".jpeg"),
            row.product,
            image,
            title,
            (row.sub_category if is_sub_task else row.category,),
            "validation" if is_validation else row.split,
            notes,
        )

    return Source(classes, False, "accuracy", rows, read, lambda row: row.where)


def _search_images(images: pathlib.Path, listed: set[str]) -> tuple[bool, int]:
    """Returns whether any listed image exists, and the number of unlisted ones."""
    any_listed, num_unlisted = False, 0
    folders = [("women", str(images))]
    while folders:
        name_above, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{name_above}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((name, entry.path))
                    elif name.endswith(".jpeg"):
                        any_listed |= name in listed
                        num_unlisted += name not in listed
        except OSError:
            continue  # its images are counted when they cannot be read
    return any_listed, num_unlisted


def _files(root: pathlib.Path) -> dict[str, bool]:
    lists = {name: (root / name).is_file() for name in _LISTS}
    images = find_images(root, "women", (ARCHIVE,))
    return lists | {f"women/ or {ARCHIVE}": images.exists()}


def _watched(root: pathlib.Path) -> list[pathlib.Path]:
    images = find_images(root, "women", (ARCHIVE,))
    # Without the folders of products, of which there are some 70,000.
    return [images, *sorted(images.glob("*")), *sorted(images.glob("*/*"))]


RELEASE = Release(
    title="Fashion200k",
    remedy=f"get it from {PAGE}",
    sample_root="fashion200k",
    lists=_LISTS,
    images=("women", ARCHIVE),
    subfolders=("fashion-200k", "fashion200k"),
    inner_folders=("labels", "women", "detection"),
    files=_files,
    watched=_watched,
)
READER = Reader(RELEASE.locate, RELEASE.signature, open_fashion200k)
