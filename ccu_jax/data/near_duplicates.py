"""Pictures that are nearly the same: found by a perceptual hash, then compared.

A picture is shrunk to 16 x 16, and the signs of its low frequencies (against their
median) are its hash of 63 bits, as in pHash (Zauner 2010). Pairs whose hashes differ in
at most MOST_BITS bits are candidates; they count as near-duplicates when the shrunken
pictures, colours included, correlate by at least LEAST_CORRELATION.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
import scipy.fft
import scipy.sparse

from ccu_jax.data.readers.base import Progress
from ccu_jax.storage.columns import ColumnReader, ColumnWriter

MOST_BITS = 6  # of 63; every such pair is found
LEAST_CORRELATION = 0.98
_BANDS = MOST_BITS + 1
_SIDE, _LOW, _CHUNK = 16, 8, 1024
_LEAST_SPREAD = 2.0  # of 255; evener pictures look like each other and tell nothing


def clusters(
    path: pathlib.Path, has_image: np.ndarray, progress: Progress
) -> np.ndarray:
    """Which rows have pictures that are nearly the same, directly or by way of others.

    Args:
        path: An .npy file of pictures, uint8 [N, S, S, 3].
        has_image: bool [N]; rows without a picture are like no other.
        progress: Called with (what, done, total).

    Returns:
        int64 [N], the smallest row of each row's cluster; its own number when alone.
    """
    kept = path.with_name("shrunk.npy")
    try:
        hashes, telling = _shrink(path, kept, progress)
        rows = np.flatnonzero(has_image & telling)
        found = [np.empty((0, 2), np.int64)]
        with contextlib.closing(ColumnReader(kept)) as small:
            for band in range(_BANDS):
                progress("comparing pictures that look alike", band, _BANDS)
                for pairs in candidates(hashes[rows], band):
                    found.append(rows[pairs][_alike(small, rows[pairs])])
    finally:
        kept.unlink(missing_ok=True)
    progress("comparing pictures that look alike", _BANDS, _BANDS)
    return connected(len(hashes), np.concatenate(found))


def _shrink(
    path: pathlib.Path, kept: pathlib.Path, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Keeps all pictures in small; gives their hashes, and which are not too even."""
    hashes, telling = [np.empty(0, np.uint64)], [np.empty(0, bool)]
    with (
        contextlib.closing(ColumnReader(path)) as pictures,
        ColumnWriter(kept, np.uint8, (_SIDE, _SIDE, 3)) as column,
    ):
        for first in range(0, total := len(pictures), _CHUNK):
            progress("looking for near-duplicates", first, total)
            small = shrunk(pictures.slice(first, min(first + _CHUNK, total)))
            hashes.append(hashed(small))
            telling.append(small.reshape(len(small), -1).std(axis=1) >= _LEAST_SPREAD)
            column.append(small.round().astype(np.uint8))
    return np.concatenate(hashes), np.concatenate(telling)


def connected(total: int, pairs: np.ndarray) -> np.ndarray:
    """The smallest row `[total]` of those that each row is connected to by pairs."""
    graph = scipy.sparse.coo_array(
        (np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(total, total)
    )
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return first[label].astype(np.int64)


def shrunk(pictures: np.ndarray) -> np.ndarray:
    """Pictures `[N, S, S, 3]` averaged down to float32 `[N, 16, 16, 3]`."""
    side = pictures.shape[1]
    edges = np.linspace(0, side, _SIDE + 1)
    pixel = np.arange(side)
    # How much of each pixel lies in each of the 16 stretches.
    ends, begins = edges[1:, None], edges[:-1, None]
    weight = np.minimum(ends, pixel + 1) - np.maximum(begins, pixel)
    weight = (weight.clip(0) * _SIDE / side).astype(np.float32)
    return np.einsum("yh,nhwc,xw->nyxc", weight, pictures, weight, optimize=True)


def hashed(small: np.ndarray) -> np.ndarray:
    """The hashes uint64 `[N]` of shrunken pictures `[N, 16, 16, 3]`."""
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    low = scipy.fft.dctn(grey, axes=(1, 2), norm="ortho")[:, :_LOW, :_LOW]
    low = low.reshape(len(low), -1)[:, 1:]  # the mean says nothing of the content
    bits = low > np.median(low, axis=1, keepdims=True)
    return bits @ (np.uint64(1) << np.arange(low.shape[1], dtype=np.uint64))


def candidates(hashes: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """Pairs `[n, 2]` of rows whose hashes differ in at most MOST_BITS bits.

    The bits are cut into one band more than may differ, so one band of such a pair is
    equal (Manku et al. 2007): a pair comes with the first band that is. Rows of one
    hash are paired with the first of them only, with the first band.
    """
    if not len(hashes):  # no row has a picture
        return
    unique, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    if not band:
        same = np.stack([first[which], np.arange(len(hashes))], 1)
        yield same[same[:, 0] != same[:, 1]]
    part = unique & _mask(band)
    order = np.argsort(part, kind="stable")
    starts = np.flatnonzero(np.diff(part[order], prepend=~part[order[:1]]))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        for pairs in _close(unique, order[start:end]):
            apart = unique[pairs[:, 0]] ^ unique[pairs[:, 1]]
            new = np.ones(len(pairs), bool)
            for earlier in range(band):
                new &= (apart & _mask(earlier)) != 0
            yield np.sort(first[pairs[new]], axis=1)


def _mask(band: int) -> np.uint64:
    """The bits of a band."""
    low, high = (63 * edge // _BANDS for edge in (band, band + 1))
    return np.uint64((1 << high) - (1 << low))


def _close(unique, bucket) -> Iterator[np.ndarray]:
    """The pairs of a bucket that are close enough, a block of rows at a time."""
    block = max(1, 4_000_000 // max(len(bucket), 1))
    for start in range(0, len(bucket), block):
        left, right = bucket[start : start + block], bucket[start:]
        apart = np.bitwise_count(unique[left][:, None] ^ unique[right][None])
        a, b = np.nonzero(apart <= MOST_BITS)
        pairs = np.stack([left[a], right[b]], 1)
        if len(pairs := pairs[a < b]):
            yield pairs


def _alike(small: ColumnReader, pairs: np.ndarray) -> np.ndarray:
    """Which pairs `[n, 2]` of shrunken pictures correlate strongly enough, `[n]`."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        a, b = (small.take(part[:, side]).astype(np.float32) for side in (0, 1))
        a, b = (x.reshape(len(x), -1) for x in (a, b))
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
        alike[start : start + len(part)] = (a * b).sum(1) >= LEAST_CORRELATION * scale
    return alike
