"""Measures how many pictures a second reach a training step, and by which way.

All ways are measured in one process and in turn, so that noise hits all alike; the
files are in the system's memory, not on a cold disk.
"""

import io
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ccu_jax import data
from ccu_jax.benchmarks import prepare as bench_prepare
from ccu_jax.data import batches as pipeline
from ccu_jax.data import input_pipeline
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation import tfds_builders as records
from ccu_jax.distributed import device_tables
from ccu_jax.errors import UserError

BATCHES = (64, 256)
POSTER = (675, 1000)  # pixels, as official posters often have
_GRAIN, _QUALITY = 14, 90  # make such a JPEG about 0.3 MB, as official ones are
_WINDOW_S = 0.25  # of the feed
_FEWER = 4  # steps of a window are made by the ways that are so much slower
_COLUMNS = ("text", "labels", "has_image", "has_text")
PILLOW, TF_DATA = "decode, Pillow", "decode, tf.data"
FEED, TAKE = "feed", "numpy take"
DEVICE, HOST = "gather on device", "send from host"


class _Way(NamedTuple):
    """One way from the disk to a step; `run(window)` handles some pictures."""

    name: str
    batch: int | None
    run: Callable[[int], int]  # gives their number


def write_posters(folder: pathlib.Path, source: pathlib.Path, number: int) -> None:
    """Full-size posters as JPEG: those of the sample edition enlarged, with grain."""
    if len(list(folder.glob("*.jpg"))) == number:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    small = sorted(source.rglob("*.jpeg"))
    screen = bench_prepare.Screen("posters")
    for place in range(number):
        screen("drawing full-size posters", place, number)
        rng = np.random.default_rng(place)
        with Image.open(small[place % len(small)]) as image:
            image = image.convert("RGB").resize(POSTER, Image.Resampling.BICUBIC)
        grain = rng.normal(0, _GRAIN, (*image.size[::-1], 1)).astype(np.float32)
        pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=_QUALITY)
        (folder / f"{place:05d}.jpg").write_bytes(file.getvalue())


def measure(
    loaded: data.Dataset, posters: pathlib.Path, windows: int, batches=BATCHES
) -> dict[str, Any]:
    """Pictures a second of all ways, for one prepared data set.

    Args:
        loaded: The data set; the side of its pictures is what posters are decoded to.
        posters: A folder of full-size posters.
        windows: How often each way is measured; its first time is not counted.
        batches: Rows of a step.

    Returns:
        `size`, `rows` and the like; `ways`: name, batch, pictures a second (median,
        low, high, all windows), `to_decode`, `to_take` (median of the ratios to the
        faster way of decoding, and to NumPy's gather, in the same window); `notes`.
    """
    size, rows = loaded.image.shape[1], len(loaded.id)
    screen, notes = bench_prepare.Screen(f"{size} pixels"), []
    paths = sorted(posters.glob("*.jpg"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ways = [_Way(PILLOW, None, _pillow(paths, size, pool))]
        try:
            ways.append(_Way(TF_DATA, None, _tf_data(paths, size)))
        except UserError as error:
            notes.append(f"{TF_DATA}: {str(error).partition(':')[0]}")
        for batch in batches:
            plans = _plans(loaded, batch, windows + 1)
            ways += [_Way(FEED, batch, _feed(loaded, plans))]
            ways += [_Way(TAKE, batch, _take(loaded, plans))]
            ways += _on_devices(loaded, plans, notes)
        rates = _rates(ways, windows, screen)
    megabytes = statistics.mean(path.stat().st_size for path in paths) / 1e6
    return {
        "size": size,
        "rows": rows,
        "image_mib": loaded.image.nbytes / 2**20,
        "posters": len(paths),
        "poster_mb": megabytes,
        "ways": [_told(way, rates) for way in ways],
        "notes": notes,
    }


def _rates(ways: list[_Way], windows: int, screen) -> dict[tuple, list[float]]:
    rates: dict[tuple, list[float]] = {(way.name, way.batch): [] for way in ways}
    for window in range(windows + 1):
        screen("measuring windows", window, windows)
        # Now one and now the other first: noise that grows would favour one of them.
        for way in ways if window % 2 else ways[::-1]:
            began = time.perf_counter()
            number = way.run(window)
            seconds = time.perf_counter() - began
            if window:  # the first one compiles, and brings the files into memory
                rates[way.name, way.batch].append(number / seconds)
    return rates


def _told(way: _Way, rates: dict[tuple, list[float]]) -> dict[str, Any]:
    mine = rates[way.name, way.batch]
    decoding = [
        rates[name, None] for name in (PILLOW, TF_DATA) if (name, None) in rates
    ]
    fastest = max(decoding, key=statistics.median)
    take = rates.get((TAKE, way.batch))
    return {
        "way": way.name,
        "batch": way.batch,
        "median": statistics.median(mine),
        "low": min(mine),
        "high": max(mine),
        "windows": mine,
        "to_decode": _ratio(mine, fastest),
        "to_take": take and _ratio(mine, take),
    }


def _ratio(one: Iterable[float], other: Iterable[float]) -> float:
    """The median of the ratios in the same windows."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


# --- decoding anew each epoch ---------------------------------------------------------


def _pillow(paths, size: int, pool: ThreadPoolExecutor) -> Callable[[int], int]:
    def one(path: pathlib.Path) -> np.ndarray:
        return pictures.decode(path.read_bytes(), size).pixels

    return lambda window: sum(len(square) == size for square in pool.map(one, paths))


def _tf_data(paths, size: int) -> Callable[[int], int]:
    batches = records.decoding(paths, size)
    return lambda window: sum(map(len, batches.as_numpy_iterator()))


# --- what is prepared -----------------------------------------------------------------


def _plans(loaded: data.Dataset, batch: int, windows: int) -> np.ndarray:
    """The steps of each window: consecutive ones of one long shuffled training."""
    rows, columns = np.arange(len(loaded.id)), _table(loaded)
    trial = pipeline.plan_batches(rows, batch, max(1, 2048 // batch), 0)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        _drained(input_pipeline.iterate_batches(columns, trial))
        seconds.append(time.perf_counter() - began)
    steps = max(1, round(len(trial) * _WINDOW_S / min(seconds)))
    plan = pipeline.plan_batches(rows, batch, steps * windows, 0)
    return plan.reshape(windows, steps, batch)


def _table(loaded: data.Dataset) -> dict[str, Any]:
    """The columns as a run has them where pictures stay on the host."""
    image = device_tables.HostColumn(loaded.image, loaded.has_image)
    return {"image": image} | {name: getattr(loaded, name) for name in _COLUMNS}


def _drained(batches: Iterable) -> int:
    number = 0
    for batch in batches:
        number += len(batch["row"])
    return number


def _feed(loaded: data.Dataset, plans: np.ndarray) -> Callable[[int], int]:
    columns = _table(loaded)
    return lambda window: _drained(
        input_pipeline.iterate_batches(columns, plans[window])
    )


def _take(loaded: data.Dataset, plans: np.ndarray) -> Callable[[int], int]:
    image = np.asarray(loaded.image)  # as NumPy takes it fastest

    def run(window: int) -> int:
        number = 0
        for rows in plans[window]:
            # It keeps one batch until the next is there, as whoever is fed does.
            batch = np.take(image, rows, axis=0)
            number += len(batch)
        return number

    return run


def _on_devices(loaded, plans: np.ndarray, notes: list[str]) -> list[_Way]:
    """How rows come to the devices in a training step: by index, or as they are."""
    from ccu_jax.distributed import executors as parallel

    executor, batch = parallel.EXECUTORS["pmap"](), plans.shape[-1]
    if batch % executor.num_devices:
        notes.append(
            f"batch {batch}: cannot be shared by {executor.num_devices} devices"
        )
        return []
    compiled = executor.compile(
        lambda state, resident, index: (
            state,
            device_tables.gather_rows(resident, index),
        )
    )

    def by(table) -> Callable[[int], int]:
        resident = executor.replicate(device_tables.device_columns(table))

        def run(window: int) -> int:
            number, steps = 0, max(1, plans.shape[1] // _FEWER)
            for rows in plans[window][:steps]:
                index = device_tables.send_rows(executor, table, rows)
                for array in compiled((), resident, index)[1].values():
                    array.block_until_ready()
                number += len(rows)
            return number

        return run

    hosted = _table(loaded)
    ways = [_Way(HOST, batch, by(hosted))]
    if not parallel.fits(loaded.image.nbytes):
        notes.append(f"{DEVICE}: the pictures do not fit there")
        return ways
    there = hosted | {"image": np.asarray(loaded.image)}
    return [_Way(DEVICE, batch, by(there)), *ways]
