"""Near-duplicates: copies are found, other pictures are not."""

import io
import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.clipart import CLIPART
from ccu_jax.data.preparation import images as pictures

SIZE = 48


def squares(images):
    made = []
    for image, kind, options in images:
        file = io.BytesIO()
        image.save(file, kind, **options)
        made.append(pictures.decode(file.getvalue(), SIZE).pixels)
    return np.stack(made)


def clusters(folder: pathlib.Path, stored, has_image=None):
    np.save(folder / "image.npy", stored)
    has_image = np.full(len(stored), True) if has_image is None else has_image
    return duplicates.find_clusters(folder / "image.npy", has_image, lambda *told: None)


@pytest.fixture(scope="module")
def drawings():
    chosen = [CLIPART / "images" / f"{n:04d}.jpg" for n in range(0, 1400, 14)]
    return [Image.open(path).convert("RGB") for path in chosen]


VARIANTS = {
    "the same file": (lambda i: (i, "jpeg", {"quality": 95}), 1.0),
    "as PNG": (lambda i: (i, "png", {}), 1.0),
    "strongly compressed": (lambda i: (i, "jpeg", {"quality": 40}), 0.95),
    "with less contrast": (
        lambda i: (ImageEnhance.Contrast(i).enhance(0.8), "jpeg", {}),
        0.95,
    ),
    "at half the size": (
        lambda i: (i.resize([max(8, s // 2) for s in i.size]), "jpeg", {}),
        0.8,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_copy_is_found(drawings, name, tmp_path):
    change, least = VARIANTS[name]
    stored = squares([(i, "jpeg", {"quality": 95}) for i in drawings])
    again = squares([change(i) for i in drawings])
    found = clusters(tmp_path, np.concatenate([stored, again]))
    assert (found[100:] == found[:100]).mean() >= least


def test_other_pictures_are_not_taken_for_copies(drawings, tmp_path):
    found = clusters(tmp_path, squares([(i, "png", {}) for i in drawings]))
    assert (found != np.arange(100)).sum() <= 1  # two of the drawings are much alike


def test_mirrored_or_recoloured_pictures_are_other_pictures(drawings, tmp_path):
    lively = [i for i in drawings if np.asarray(i).std() > 60][:20]
    for change in (
        lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda i: Image.merge("RGB", i.split()[::-1]),
    ):
        both = squares([(x, "png", {}) for i in lively for x in (i, change(i))])
        found = clusters(tmp_path, both)
        # Some drawings are symmetric, or grey.
        assert (found[1::2] == found[::2]).mean() < 0.5


def test_rows_without_a_picture_and_even_pictures_are_alone(tmp_path):
    rng = np.random.default_rng(0)
    one = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    white = np.full_like(one, 255)
    stored = np.stack([one, one, one, white, white, one])
    has_image = np.array([True, False, True, True, True, True])
    found = clusters(tmp_path, stored, has_image)
    assert found.tolist() == [0, 1, 0, 3, 4, 0]


def test_a_chain_of_near_duplicates_is_one_cluster():
    pairs = np.array([[3, 5], [5, 1], [7, 8]])
    found = duplicates.connected_components(10, pairs)
    assert found.tolist() == [0, 1, 2, 1, 4, 1, 6, 7, 7, 9]


def all_candidates(hashes):
    bands = range(duplicates.MAX_BITS + 1)
    found = [p for band in bands for p in duplicates.candidate_pairs(hashes, band)]
    return np.concatenate(found).tolist()


def test_every_pair_of_close_hashes_is_a_candidate():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    for row in range(100, 300):  # others with some bits turned
        bits = rng.choice(63, row % 9, replace=False).astype(np.uint64)
        hashes[row] = hashes[row - 100] ^ np.bitwise_or.reduce(
            np.uint64(1) << bits, initial=np.uint64(0)
        )
    together = all_candidates(hashes)
    found = set(map(frozenset, together))
    assert len(found) == len(together), "each pair comes once"
    for a, b in itertools.combinations(range(300), 2):
        apart = int(hashes[a] ^ hashes[b]).bit_count()
        if 0 < apart <= duplicates.MAX_BITS:
            # Of rows with one hash, the first stands for all.
            first = [int(np.flatnonzero(hashes == hashes[x])[0]) for x in (a, b)]
            assert frozenset(first) in found
        elif apart > duplicates.MAX_BITS:
            assert frozenset((a, b)) not in found


def test_many_copies_of_one_picture_take_no_quadratic_time():
    hashes = np.full(50_000, 12345, np.uint64)
    pairs = np.array(all_candidates(hashes))
    assert len(pairs) == 49_999 and not pairs[:, 0].any()


@pytest.mark.parametrize("side", [8, 17, 48])
def test_shrinking_is_averaging(side):
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 255, (2, side, side, 3), np.uint8)
    small = duplicates.shrink(stored)
    np.testing.assert_allclose(small.mean((1, 2)), stored.mean((1, 2)), rtol=1e-5)
    if side == 48:
        by_hand = stored.reshape(2, 16, 3, 16, 3, 3).mean((2, 4))
        np.testing.assert_allclose(small, by_hand, rtol=1e-5)
