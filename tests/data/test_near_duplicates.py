"""Near-duplicate images are found, and other images are not."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ccu_jax.data.near_duplicates import (
    MAX_BITS,
    candidate_pairs,
    connected_components,
    find_clusters,
    shrink,
)
from ccu_jax.data.preparation.images import decode
from ccu_jax.data.readers.base import CLIPART

SIZE = 48


def decode_all(encoded):
    """Encodes (image, format, options) and decodes them as a data set would."""
    pixels = []
    for image, format_, options in encoded:
        file = io.BytesIO()
        image.save(file, format_, **options)
        pixels.append(decode(file.getvalue(), SIZE).pixels)
    return np.stack(pixels)


def cluster_images(folder, images, has_image=None):
    np.save(folder / "image.npy", images)
    has_image = np.full(len(images), True) if has_image is None else has_image
    return find_clusters(folder / "image.npy", has_image, lambda *stage: None)


@pytest.fixture(scope="module")
def drawings():
    paths = [CLIPART / "images" / f"{n:04d}.jpg" for n in range(0, 1400, 14)]
    return [Image.open(path).convert("RGB") for path in paths]


def lower_contrast(image):
    return ImageEnhance.Contrast(image).enhance(0.8)


def halve(image):
    return image.resize([max(8, side // 2) for side in image.size])


COPIES = {
    "same file": (lambda i: (i, "jpeg", {"quality": 95}), 1.0),
    "PNG": (lambda i: (i, "png", {}), 1.0),
    "strong compression": (lambda i: (i, "jpeg", {"quality": 40}), 0.95),
    "less contrast": (lambda i: (lower_contrast(i), "jpeg", {}), 0.95),
    "half the size": (lambda i: (halve(i), "jpeg", {}), 0.8),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(drawings, name, tmp_path):
    copy, min_fraction = COPIES[name]
    originals = decode_all([(i, "jpeg", {"quality": 95}) for i in drawings])
    copies = decode_all([copy(i) for i in drawings])
    cluster = cluster_images(tmp_path, np.concatenate([originals, copies]))
    assert (cluster[100:] == cluster[:100]).mean() >= min_fraction


def test_different_images_are_not_clustered(drawings, tmp_path):
    cluster = cluster_images(tmp_path, decode_all([(i, "png", {}) for i in drawings]))
    assert (cluster != np.arange(100)).sum() <= 1  # two drawings are very similar


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: Image.merge("RGB", image.split()[::-1]),
    ],
    ids=["mirrored", "recolored"],
)
def test_changed_images_are_different_images(drawings, change, tmp_path):
    chosen = [image for image in drawings if np.asarray(image).std() > 60][:20]
    both = [(x, "png", {}) for image in chosen for x in (image, change(image))]
    cluster = cluster_images(tmp_path, decode_all(both))
    # Some drawings are symmetric, or gray.
    assert (cluster[1::2] == cluster[::2]).mean() < 0.5


def test_missing_and_uniform_images_are_not_clustered(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    white = np.full_like(noise, 255)
    images = np.stack([noise, noise, noise, white, white, noise])
    has_image = np.array([True, False, True, True, True, True])
    cluster = cluster_images(tmp_path, images, has_image)
    assert cluster.tolist() == [0, 1, 0, 3, 4, 0]


def test_connected_components_are_transitive():
    edges = np.array([[3, 5], [5, 1], [7, 8]])
    component = connected_components(10, edges)
    assert component.tolist() == [0, 1, 2, 1, 4, 1, 6, 7, 7, 9]


def all_candidates(hashes):
    bands = [
        pairs for band in range(MAX_BITS + 1) for pairs in candidate_pairs(hashes, band)
    ]
    return np.concatenate(bands).tolist()


def test_each_pair_of_close_hashes_is_a_candidate_once():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, np.uint64)
    for row in range(100, 300):  # copies with up to 8 flipped bits
        bits = rng.choice(63, row % 9, replace=False).astype(np.uint64)
        flips = np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
        hashes[row] = hashes[row - 100] ^ flips
    pairs = all_candidates(hashes)
    candidates = set(map(frozenset, pairs))
    assert len(candidates) == len(pairs)
    for a, b in itertools.combinations(range(300), 2):
        distance = int(hashes[a] ^ hashes[b]).bit_count()
        if 0 < distance <= MAX_BITS:
            # The first of several rows with the same hash represents them.
            first = [int(np.flatnonzero(hashes == hashes[x])[0]) for x in (a, b)]
            assert frozenset(first) in candidates
        elif distance > MAX_BITS:
            assert frozenset((a, b)) not in candidates


def test_copies_of_one_image_do_not_take_quadratic_time():
    pairs = np.array(all_candidates(np.full(50_000, 12345, np.uint64)))
    assert len(pairs) == 49_999
    assert not pairs[:, 0].any()


@pytest.mark.parametrize("size", [8, 17, 48])
def test_shrink_averages_pixels(size):
    images = np.random.default_rng(0).integers(0, 255, (2, size, size, 3), np.uint8)
    small = shrink(images)
    np.testing.assert_allclose(small.mean((1, 2)), images.mean((1, 2)), rtol=1e-5)
    if size == 48:
        blocks = images.reshape(2, 16, 3, 16, 3, 3).mean((2, 4))
        np.testing.assert_allclose(small, blocks, rtol=1e-5)
