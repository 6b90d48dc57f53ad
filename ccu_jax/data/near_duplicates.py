"""Near-duplicate images: candidates by a perceptual hash, confirmed by correlation.

An image is reduced to 16 x 16. Its 63-bit hash consists of the signs of the low DCT
frequencies relative to their median, as in pHash (Zauner 2010). Image pairs whose
hashes differ in at most MAX_BITS bits are candidates. They are near-duplicates if the
reduced color images correlate by at least MIN_CORRELATION.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
import scipy.fft
import scipy.sparse

from ccu_jax.data.readers.base import Progress
from ccu_jax.storage.columns import ColumnReader, ColumnWriter

MAX_BITS = 6  # of 63
MIN_CORRELATION = 0.98
_NUM_BANDS = MAX_BITS + 1
_SIZE = 16  # side of the reduced image, pixels
_NUM_FREQUENCIES = 8  # per axis
_CHUNK = 1024  # rows
_MIN_STD = 2.0  # of pixel values in 0..255; flatter images have no content to compare


def find_clusters(
    path: pathlib.Path, has_image: np.ndarray, progress: Progress
) -> np.ndarray:
    """Clusters rows by the transitive closure of near-duplicate images.

    Args:
        path: .npy file of images, uint8 [N, S, S, 3].
        has_image: bool [N]; each row without an image is a cluster of its own.
        progress: called with (stage, done, total).

    Returns:
        int64 [N], the smallest row number of each row's cluster.
    """
    stage = "comparing images that look alike"
    reduced_path = path.with_name("shrunk.npy")
    try:
        hashes, is_textured = _reduce_images(path, reduced_path, progress)
        rows = np.flatnonzero(has_image & is_textured)
        duplicates = [np.empty((0, 2), np.int64)]
        with contextlib.closing(ColumnReader(reduced_path)) as reduced:
            for band in range(_NUM_BANDS):
                progress(stage, band, _NUM_BANDS)
                for pairs in candidate_pairs(hashes[rows], band):
                    is_duplicate = _are_correlated(reduced, rows[pairs])
                    duplicates.append(rows[pairs][is_duplicate])
    finally:
        reduced_path.unlink(missing_ok=True)
    progress(stage, _NUM_BANDS, _NUM_BANDS)
    return connected_components(len(hashes), np.concatenate(duplicates))


def _reduce_images(
    path: pathlib.Path, reduced_path: pathlib.Path, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the reduced images; returns their hashes and whether each has texture."""
    hashes, is_textured = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    with (
        contextlib.closing(ColumnReader(path)) as images,
        ColumnWriter(reduced_path, np.uint8, (_SIZE, _SIZE, 3)) as column,
    ):
        for start in range(0, total := images.shape[0], _CHUNK):
            progress("looking for near-duplicates", start, total)
            reduced = shrink(images.slice(start, min(start + _CHUNK, total)))
            std = reduced.reshape(len(reduced), -1).std(axis=1)
            hashes.append(perceptual_hash(reduced))
            is_textured.append(std >= _MIN_STD)
            column.append(reduced.round().astype(np.uint8))
    return np.concatenate(hashes), np.concatenate(is_textured)


def connected_components(total: int, pairs: np.ndarray) -> np.ndarray:
    """Returns the smallest row number of each row's connected component, int [N].

    Args:
        total: number of rows N.
        pairs: int [n, 2], the edges.
    """
    graph = scipy.sparse.coo_array(
        (np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(total, total)
    )
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return first[label].astype(np.int64)


def shrink(images: np.ndarray) -> np.ndarray:
    """Downscales images [N, S, S, 3] by area averaging to float32 [N, 16, 16, 3]."""
    size = images.shape[1]
    edges = np.linspace(0, size, _SIZE + 1)
    pixel = np.arange(size)
    # The overlap of each source pixel with each of the 16 target pixels.
    stop, start = edges[1:, None], edges[:-1, None]
    weight = np.minimum(stop, pixel + 1) - np.maximum(start, pixel)
    weight = (weight.clip(0) * _SIZE / size).astype(np.float32)
    return np.einsum("yh,nhwc,xw->nyxc", weight, images, weight, optimize=True)


def perceptual_hash(reduced: np.ndarray) -> np.ndarray:
    """Computes 63-bit hashes, uint64 [N], of reduced images [N, 16, 16, 3]."""
    gray = reduced @ np.array([0.299, 0.587, 0.114], np.float32)
    frequencies = scipy.fft.dctn(gray, axes=(1, 2), norm="ortho")
    low = frequencies[:, :_NUM_FREQUENCIES, :_NUM_FREQUENCIES]
    low = low.reshape(len(low), -1)[:, 1:]  # without the mean brightness
    bits = low > np.median(low, axis=1, keepdims=True)
    return bits @ (np.uint64(1) << np.arange(low.shape[1], dtype=np.uint64))


def candidate_pairs(hashes: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """Yields pairs of rows that share a band and differ in at most MAX_BITS bits.

    The bits are divided into MAX_BITS + 1 bands, so the hashes of such a pair agree in
    at least one band (Manku et al. 2007). A pair is yielded for the first band in which
    they agree. Rows with equal hashes are paired only with the first of them, in
    band 0.

    Args:
        hashes: uint64 [N].
        band: the band of bits to compare, in [0, MAX_BITS].

    Yields:
        int [n, 2], pairs of row numbers.
    """
    if not len(hashes):
        return
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    if not band:
        copies = np.stack([first[inverse], np.arange(len(hashes))], 1)
        yield copies[copies[:, 0] != copies[:, 1]]
    band_bits = unique & _band_mask(band)
    order = np.argsort(band_bits, kind="stable")
    starts = np.flatnonzero(np.diff(band_bits[order], prepend=~band_bits[order[:1]]))
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        for pairs in _iter_close_pairs(unique, order[start:stop]):
            difference = unique[pairs[:, 0]] ^ unique[pairs[:, 1]]
            is_new = np.ones(len(pairs), bool)
            for earlier in range(band):
                is_new &= (difference & _band_mask(earlier)) != 0
            yield np.sort(first[pairs[is_new]], axis=1)


def _band_mask(band: int) -> np.uint64:
    low, high = (63 * edge // _NUM_BANDS for edge in (band, band + 1))
    return np.uint64((1 << high) - (1 << low))


def _iter_close_pairs(unique: np.ndarray, bucket: np.ndarray) -> Iterator[np.ndarray]:
    """Yields int [n, 2]: pairs in a bucket that differ in at most MAX_BITS bits."""
    block = max(1, 4_000_000 // max(len(bucket), 1))  # bounds the memory in use
    for start in range(0, len(bucket), block):
        left, right = bucket[start : start + block], bucket[start:]
        distance = np.bitwise_count(unique[left][:, None] ^ unique[right][None])
        a, b = np.nonzero(distance <= MAX_BITS)
        pairs = np.stack([left[a], right[b]], 1)
        if len(pairs := pairs[a < b]):
            yield pairs


def _are_correlated(reduced: ColumnReader, pairs: np.ndarray) -> np.ndarray:
    """Returns bool [n]: whether each pair correlates by at least MIN_CORRELATION."""
    is_duplicate = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        a, b = (reduced.take(chunk[:, side]).astype(np.float32) for side in (0, 1))
        a, b = (x.reshape(len(x), -1) for x in (a, b))
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        is_duplicate[start : start + _CHUNK] = (a * b).sum(1) >= MIN_CORRELATION * scale
    return is_duplicate
