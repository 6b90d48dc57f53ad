"""`python -m ccu_jax.benchmarks data`: preparing data sets and feeding them.

`prepare`: seconds of each stage and memory, at the sizes of the official editions.
`feed`: images per second that reach a step in several ways, all from files in the page
cache.
"""

import argparse
import dataclasses
import functools
import io
import os
import pathlib
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.table import Table

from ccu_jax import data
from ccu_jax.benchmarks import harness
from ccu_jax.benchmarks.harness import Column, Command, Progress
from ccu_jax.config import Data
from ccu_jax.config.loading import load_config
from ccu_jax.data.batches import iterate_batches, jpeg_dataset, plan_batches
from ccu_jax.data.preparation import images
from ccu_jax.data.samples import editions
from ccu_jax.distributed import device_tables
from ccu_jax.distributed.executors import EXECUTORS, Executor, fits
from ccu_jax.errors import UserError

HELP = "preparing data sets, and images per second of the input pipeline"
PARTS = ("prepare", "feed")
NUM_ROWS = {"mmimdb": 25_959, "fashion200k": 201_838}  # of the official editions
FEED_DATASET = "mmimdb"
PILLOW, MEMORY_MAP = "decode, Pillow", "memory map"
_FEED_ROWS = {48: None, 224: 3000}  # max. rows by image size; 224 px take 147 KiB each
_BATCHES = (64, 256)
_WINDOW_ROWS = 4096
_POSTER_SIZE = (675, 1000)  # px, of a typical official poster
_NOISE, _QUALITY = 14, 90  # make it a JPEG of about 0.3 MB
_EARLY_FRACTION = 0.01  # memory should hardly grow after this fraction of the rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = functools.partial(harness.add_flag, parser)
    for name, num_rows in NUM_ROWS.items():
        help_text = f"rows of {name}; 0 leaves it out"
        add(f"--rows-{name}", harness.at_least(0), num_rows, help_text)
    add("--only", harness.list_of(harness.one_of(PARTS)), [*PARTS])
    add("--posters", harness.at_least(1), 200, "JPEG files that are decoded")
    add("--dir", harness.user_path, "runs/bench", "where data are written and kept")
    add("--windows", harness.at_least(1), 7, "measurements of each way")
    help_text = "prepare without TFDS records"
    parser.add_argument("--no-records", action="store_true", help=help_text)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures both parts, or the one that --only names."""
    num_rows = {name: getattr(flags, f"rows_{name}") for name in NUM_ROWS}
    measured: dict[str, Any] = {"prepare": [], "feed": []}
    # All samples come first, so that a wrong number of rows is reported at once.
    roots = {
        name: _write_sample(name, count, flags.dir)
        for name, count in num_rows.items()
        if count
    }
    for name, root in roots.items() if "prepare" in flags.only else ():
        measured["prepare"].append(
            measure_preparation(name, root, flags.dir, not flags.no_records)
        )
    if "feed" not in flags.only or FEED_DATASET not in roots:
        return measured
    posters = flags.dir / f"posters-{flags.posters}"
    write_posters(posters, roots[FEED_DATASET], flags.posters)
    for size, max_rows in _FEED_ROWS.items():
        count = min(num_rows[FEED_DATASET], max_rows or num_rows[FEED_DATASET])
        root = _write_sample(FEED_DATASET, count, flags.dir)
        settings = _settings(FEED_DATASET, root, image_size=size, records=False)
        progress = Progress(f"{FEED_DATASET}, {size} px")
        workdir = flags.dir / f"{FEED_DATASET}-{count}-{size}"
        dataset = data.load(settings, workdir, progress)
        measured["feed"].append(measure_feed(dataset, posters, flags.windows))
    return measured


def _write_sample(name: str, num_rows: int, folder: pathlib.Path) -> pathlib.Path:
    root = folder / f"sample-{name}-{num_rows}"
    editions.write_if_missing(name, root, num_rows, 0, Progress(name))
    return root


def _settings(name: str, root: pathlib.Path, **fields: Any) -> Data:
    return dataclasses.replace(load_config(name).data, dir=str(root), **fields)


# --- preparing ------------------------------------------------------------------------


def measure_preparation(
    name: str, root: pathlib.Path, folder: pathlib.Path, records: bool
) -> dict[str, Any]:
    """Prepares a sample edition, and opens it a second time.

    Prepared data of an earlier run in the folder are removed. With `records`, TFDS
    records are stored as well.

    Returns:
        `name`, and the results of `prepare` as `first` and `second`.
    """
    workdir = folder / f"prepared-{name}"
    shutil.rmtree(workdir, ignore_errors=True)
    result: dict[str, Any] = {"name": name}
    settings = _settings(name, root, records=records)
    for start in ("first", "second"):
        title = f"{name}, {start} start"
        # A new process, whose memory is that of the preparation alone.
        with harness.ChildProcess() as child:
            args = (settings, workdir, title)
            result[start] = child.call("input_pipeline", "prepare", *args)
    return result


def prepare(settings: Data, workdir: pathlib.Path, title: str) -> dict[str, Any]:
    """Prepares a data set.

    Returns:
        `seconds`, `stages_s`, `rows`, `stored_mib`, and the resident memory `early_mib`
        after 1 % of the rows and `peak_mib`.
    """
    clock, start = _StageClock(title), time.monotonic()
    dataset = data.load(settings, workdir, clock)
    files = [file for file in (workdir / "data").iterdir() if file.is_file()]
    return {
        "seconds": time.monotonic() - start,
        "stages_s": dict(clock.seconds),
        "rows": len(dataset.id),
        "stored_mib": sum(file.stat().st_size for file in files) / 2**20,
        "early_mib": clock.early_mib,
        "peak_mib": harness.memory_mib("VmHWM"),
    }


class _StageClock:
    """A progress callback that adds up the seconds of each stage."""

    def __init__(self, title: str):
        self._print, self._stage, self._last_s = (
            Progress(title),
            "open",
            time.monotonic(),
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.early_mib: float | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.seconds[self._stage] += now - self._last_s
        self._stage, self._last_s = stage, now
        if self.early_mib is None and done >= _EARLY_FRACTION * total:
            self.early_mib = harness.memory_mib("VmRSS")
        self._print(stage, done, total)


# --- feeding --------------------------------------------------------------------------


def write_posters(folder: pathlib.Path, source: pathlib.Path, count: int) -> None:
    """Writes posters of official size: images of the sample, enlarged, with noise."""
    if len(list(folder.glob("*.jpg"))) == count:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths, progress = sorted(source.rglob("*.jpeg")), Progress("posters")
    for number in range(count):
        progress("writing", number, count)
        rng = np.random.default_rng(number)
        with Image.open(paths[number % len(paths)]) as image:
            image = image.convert("RGB").resize(_POSTER_SIZE, Image.Resampling.BICUBIC)
        noise = rng.normal(0, _NOISE, (*image.size[::-1], 1)).astype(np.float32)
        pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=_QUALITY)
        (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())


def measure_feed(
    dataset: data.Dataset, posters: pathlib.Path, windows: int
) -> dict[str, Any]:
    """Measures images per second in every way, in turn.

    The JPEG files of `posters` are decoded to the size of the prepared images.

    Returns:
        `size` in pixels, `rows`, and `rates`: for each way and batch the images per
        second, and their ratio to the faster way of decoding.
    """
    size, paths = dataset.image.shape[1], sorted(posters.glob("*.jpg"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        calls: dict[tuple[str, int | None], Callable[[], float]] = {
            (way, None): call for way, call in _decode_ways(paths, size, pool)
        }
        for batch in _BATCHES:
            ways = _batch_ways(dataset, batch)
            calls |= {(way, batch): call for way, call in ways.items()}
        results = harness.measure_in_turn(calls, windows, Progress(f"{size} px"))
    rates = {key: harness.summarize(values) for key, values in results.items()}
    decode = max(
        (rate for (_, batch), rate in rates.items() if batch is None),
        key=lambda rate: rate["median"],
    )
    return {
        "size": size,
        "rows": len(dataset.id),
        "rates": [
            {
                "way": way,
                "batch": batch,
                "images_per_s": rate,
                "ratio": harness.median_ratio(rate, decode),
            }
            for (way, batch), rate in rates.items()
        ],
    }


def _make_rate(num_images: int, call: Callable[[], Any]) -> Callable[[], float]:
    def measure_rate() -> float:
        start = time.perf_counter()
        call()
        return num_images / (time.perf_counter() - start)

    return measure_rate


def _decode_ways(
    paths: list[pathlib.Path], size: int, pool: ThreadPoolExecutor
) -> Iterable[tuple[str, Callable[[], float]]]:
    def decode(path: pathlib.Path) -> Any:
        return images.decode(path.read_bytes(), size)

    yield PILLOW, _make_rate(len(paths), lambda: _drain(pool.map(decode, paths)))
    try:
        decoded = jpeg_dataset(paths, size)
    except UserError as error:  # TensorFlow is not installed
        print(f"decode, tf.data: {error}", file=sys.stderr)
    else:
        run = _make_rate(len(paths), lambda: _drain(decoded.as_numpy_iterator()))
        yield "decode, tf.data", run


def _batch_ways(dataset: data.Dataset, batch: int) -> dict[str, Callable[[], float]]:
    rows = np.arange(len(dataset.id))
    plan = plan_batches(rows, batch, max(1, _WINDOW_ROWS // batch), seed=0)
    names = ("text", "labels", "has_image", "has_text")
    columns = {name: getattr(dataset, name) for name in names}
    image = device_tables.HostColumn(dataset.image, dataset.has_image)
    host, pixels = {**columns, "image": image}, np.asarray(dataset.image)
    ways: dict[str, Callable[[], Any]] = {
        MEMORY_MAP: lambda: _drain(iterate_batches(host, plan)),
        "numpy take": lambda: _drain(pixels.take(rows, axis=0) for rows in plan),
    }
    executor = EXECUTORS["pmap"]()
    if batch % executor.num_devices == 0:
        ways["send from host"] = _make_gather(executor, host, plan)
        if fits(dataset.image.nbytes):
            table = {**columns, "image": pixels}
            ways["gather on device"] = _make_gather(executor, table, plan)
    return {way: _make_rate(plan.size, call) for way, call in ways.items()}


def _drain(iterable: Iterable[Any]) -> None:
    for _ in iterable:
        pass


def _make_gather(
    executor: Executor, table: dict[str, Any], plan: np.ndarray
) -> Callable[[], None]:
    """Returns a function that gathers the rows of every batch on the devices."""
    # Executors compile functions of state, static inputs and sharded inputs.
    compiled = executor.compile(
        lambda state, columns, sent: (state, device_tables.gather_rows(columns, sent))
    )
    static = executor.replicate(device_tables.device_columns(table))

    def gather() -> None:
        for rows in plan:
            sent = device_tables.send_rows(executor, table, rows)
            jax.block_until_ready(compiled((), static, sent)[1])

    return gather


_PREPARE_COLUMNS = [
    Column("data set", "name"),
    Column("rows", "first.rows", ","),
    Column("first s", "first.seconds", ",.1f"),
    Column("rows/s", "rows_per_s", ",.0f"),
    Column("stages", "stages"),
    Column("disk MiB", "first.stored_mib", ",.0f"),
    Column("early MiB", "first.early_mib", ",.0f"),
    Column("peak MiB", "first.peak_mib", ",.0f"),
    Column("second s", "second.seconds", ".2f"),
]
_FEED_COLUMNS = [
    Column("way", "way"),
    Column("batch", "batch", "d"),
    *harness.spread_columns("median", "images_per_s", ",.0f"),
    Column("x decode", "ratio", ".1f"),
]


def make_tables(measured: dict[str, Any]) -> list[Table]:
    """Returns a table of preparation times and one of images/s per image size."""
    rows, result = [], []
    for row in measured["prepare"]:
        first = row["first"]
        stages = (f"{name} {s:.1f}" for name, s in first["stages_s"].items())
        rate = first["rows"] / first["seconds"]
        rows.append({**row, "rows_per_s": rate, "stages": "\n".join(stages)})
    if rows:
        title = "preparing the sample editions"
        result.append(harness.make_table(title, _PREPARE_COLUMNS, rows))
    for feed in measured["feed"]:
        title = f"images per second, {feed['size']} px, {feed['rows']:,} rows"
        result.append(harness.make_table(title, _FEED_COLUMNS, feed["rates"]))
    return result


COMMANDS = {"data": Command(HELP, add_flags, measure, make_tables)}
