"""Hateful Memes (Kiela et al., 2020) in its official layouts: memes, hateful or not.

    data/img/<5 digits>.png        the images, or img.tar.gz (img.zip) of them
    data/train.jsonl               one row a line: "id", "img", "label", "text"
    data/dev.jsonl  test.jsonl     first phase of the contest
    data/dev_seen.jsonl  dev_unseen.jsonl  test_seen.jsonl  test_unseen.jsonl   second

Get it from https://hatefulmemeschallenge.com/ , where its licence is accepted; this
module downloads nothing. The official files are offensive: no row of them belongs in
messages, documents or tests.
"""

import pathlib

from ccu_jax.config.schema import Data
from ccu_jax.data.readers.base import (
    Counts,
    Example,
    Location,
    Reader,
    Source,
    Unpack,
)
from ccu_jax.data.readers.hatefulmemes_splits import FILES, TRAIN, Row, read_rows
from ccu_jax.data.readers.releases import Release, find_images, unpack_images
from ccu_jax.data.readers.untrusted_files import Folder

PAGE = "https://hatefulmemeschallenge.com/"
CLASSES = ("not-hateful", "hateful")
_ARCHIVES = ("img.tar.gz", "img.zip")


def open_hatefulmemes(
    config: Data, location: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Reads the lists.

    The dev files are the validation split, and the test files with labels the test
    split. Without labelled test files, as during the contest, the dev files are the
    test split, and a fraction of the training rows becomes the validation split.

    Raises:
        UserError: no row to train on, or none to test on.
    """
    rows = read_rows(location.root, config.validation_fraction, counts)
    images = find_images(location.root, "img", _ARCHIVES)
    folder = Folder(unpack_images(images, counts, unpack, "img"))

    def read(row: Row) -> Example:
        image = folder.read(row.image, "image")
        labels = (CLASSES[row.label],)
        return Example(row.id, row.id, image, row.text, labels, row.split, row.notes)

    return Source(CLASSES, False, "auroc", rows, read, lambda row: row.id)


def _files(root: pathlib.Path) -> dict[str, bool]:
    has_images = find_images(root, "img", _ARCHIVES).exists()
    return {
        TRAIN: (root / TRAIN).is_file(),
        f"img/ or {' or '.join(_ARCHIVES)}": has_images,
    }


RELEASE = Release(
    title="Hateful Memes",
    remedy=f"get it from {PAGE} (if the download is gone, ask Meta for access)",
    sample_root="hatefulmemes/data",
    lists=FILES,
    images=("img", *_ARCHIVES),
    subfolders=("data",),
    inner_folders=("img",),
    files=_files,
    watched=lambda root: [find_images(root, "img", _ARCHIVES)],
    any_subfolder=True,
)
READER = Reader(RELEASE.locate, RELEASE.signature, open_hatefulmemes)
