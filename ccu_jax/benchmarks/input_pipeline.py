"""`python -m ccu_jax.benchmarks data`: data preparation and input pipelines.

`prepare`: seconds per stage and memory usage, at the sizes of the official editions.
`feed`: images per second of several input pipelines, with files in the page cache.
"""

import argparse
import dataclasses
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

from ccu_jax import data
from ccu_jax.benchmarks import costs, harness
from ccu_jax.benchmarks.harness import Column, Flag, Measurements, Progress
from ccu_jax.config import Data
from ccu_jax.config.loading import load_config
from ccu_jax.data.batches import iterate_batches, jpeg_dataset, plan_batches
from ccu_jax.data.preparation import images
from ccu_jax.data.samples import editions
from ccu_jax.distributed import device_tables
from ccu_jax.distributed.executors import Executor, fits_on_devices, pmap
from ccu_jax.errors import UserError

PARTS = ("prepare", "feed")
NUM_ROWS = {"mmimdb": 25_959, "fashion200k": 201_838}  # of the official editions
FEED_DATASET = "mmimdb"
PILLOW, MEMORY_MAP = "decode, Pillow", "memory map"
_FEED_ROWS = {48: None, 224: 3000}  # max. rows by image size; 224 px take 147 KiB each
_BATCHES = (64, 256)
_WINDOW_ROWS = 4096
_POSTER_SIZE = (675, 1000)  # px, of a typical official poster
_NOISE, _QUALITY = 14, 90  # yield JPEG files of about 0.3 MB
_EARLY_FRACTION = 0.01  # memory should hardly grow after this fraction of the rows
RateFn = Callable[[], float]  # returns images per second
_PREPARE_COLUMNS = [
    Column("data set", "name"),
    Column("rows", "first.rows", ","),
    Column("first s", "first.seconds", ",.1f"),
    Column("rows/s", "first.rows_per_s", ",.0f"),
    Column("stages", "stages"),
    Column("MiB at 1 %", "first.early_mib", ",.0f"),
    Column("peak MiB", "first.peak_mib", ",.0f"),
    Column("second s", "second.seconds", ".2f"),
]
_FEED_COLUMNS = [
    Column("px", "size", "d"),
    Column("rows", "rows", ","),
    Column("variant", "variant"),
    Column("batch", "batch", "d"),
    Column("images/s", "images_per_s", ",.0f"),
    Column("ratio to decoding", "ratio", ".1f"),
]


def measure(flags: argparse.Namespace) -> list[Measurements]:
    """Runs the benchmarks that --only selects."""
    counts = {name: getattr(flags, f"rows_{name}") for name in NUM_ROWS}
    counts = {name: count for name, count in counts.items() if count}
    # Write all samples first, so that a wrong number of rows fails early.
    roots = {name: _write_sample(name, n, flags.dir) for name, n in counts.items()}
    tables = []
    if "prepare" in flags.only:
        rows = [measure_preparation(name, root, flags) for name, root in roots.items()]
        title = "preparing the sample editions"
        tables.append(Measurements("prepare", title, _PREPARE_COLUMNS, rows))
    if "feed" in flags.only and FEED_DATASET in roots:
        posters = flags.dir / f"posters-{flags.posters}"
        write_posters(posters, roots[FEED_DATASET], flags.posters)
        rows = []
        for size, max_rows in _FEED_ROWS.items():
            count = min(counts[FEED_DATASET], max_rows or counts[FEED_DATASET])
            root = _write_sample(FEED_DATASET, count, flags.dir)
            config = _load_settings(FEED_DATASET, root, image_size=size, records=False)
            title, name = f"{FEED_DATASET}, {size} px", f"{FEED_DATASET}-{count}-{size}"
            dataset = data.load(config, flags.dir / name, Progress(title))
            rows += measure_feed(dataset, posters, flags.windows)
        tables.append(Measurements("feed", "images per second", _FEED_COLUMNS, rows))
    return tables


def _write_sample(name: str, num_rows: int, folder: pathlib.Path) -> pathlib.Path:
    root = folder / f"sample-{name}-{num_rows}"
    editions.write_if_missing(name, root, num_rows, 0, Progress(name))
    return root


def _load_settings(name: str, root: pathlib.Path, **fields: Any) -> Data:
    return dataclasses.replace(load_config(name).data, dir=str(root), **fields)


def measure_preparation(
    name: str, root: pathlib.Path, flags: argparse.Namespace
) -> dict[str, Any]:
    """Measures preparing a sample edition from scratch and reopening it.

    Returns a table row with the results of `prepare` as `first` and `second`.
    """
    settings = _load_settings(name, root, records=flags.records)
    workdir = flags.dir / f"prepared-{name}"
    shutil.rmtree(workdir, ignore_errors=True)
    row: dict[str, Any] = {"name": name}
    for start in ("first", "second"):
        # In a new process, so that its peak memory is that of the preparation alone.
        with harness.start_child() as call:
            title = f"{name}, {start}"
            row[start] = call("input_pipeline.prepare", settings, workdir, title)
    stages = row["first"]["stages_s"].items()
    return {**row, "stages": "\n".join(f"{stage} {s:.1f}" for stage, s in stages)}


def prepare(settings: Data, workdir: pathlib.Path, title: str) -> dict[str, Any]:
    """Prepares a data set; returns its wall time by stage and resident memory.

    Resident memory in MiB: `early_mib` after 1 % of the rows, `peak_mib` at its peak.
    """
    start = time.monotonic()
    stages_s: dict[str, float] = defaultdict(float)
    last, early_mib, report = ("open", start), None, Progress(title)

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last, early_mib
        now = time.monotonic()
        stages_s[last[0]] += now - last[1]
        last = (stage, now)
        if early_mib is None and done >= _EARLY_FRACTION * total:
            early_mib = harness.read_memory_mib("VmRSS")
        report(stage, done, total)

    num_rows = len(data.load(settings, workdir, progress).id)
    seconds = time.monotonic() - start
    return {
        "seconds": seconds,
        "stages_s": dict(stages_s),
        "rows": num_rows,
        "rows_per_s": num_rows / seconds,
        "early_mib": early_mib,
        "peak_mib": harness.read_memory_mib("VmHWM"),
    }


def write_posters(folder: pathlib.Path, source: pathlib.Path, count: int) -> None:
    """Writes JPEG files of official poster size: upscaled sample images with noise."""
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
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=_QUALITY)


def measure_feed(
    dataset: data.Dataset, posters: pathlib.Path, windows: int
) -> list[dict[str, Any]]:
    """Measures the images per second of every input pipeline, interleaved.

    The JPEG files in `posters` are decoded to the size of the prepared images. `ratio`
    is relative to the faster of the decoding pipelines.
    """
    size, paths = dataset.image.shape[1], sorted(posters.glob("*.jpg"))
    with ThreadPoolExecutor(min(8, harness.count_cores())) as pool:
        variants = {None: _make_decode_variants(paths, size, pool)}
        variants |= {batch: _make_batch_variants(dataset, batch) for batch in _BATCHES}
        calls = {(name, n): variants[n][name] for n in variants for name in variants[n]}
        results = harness.measure_interleaved(calls, windows, Progress(f"{size} px"))
    rates = {key: harness.summarize(values) for key, values in results.items()}
    decode_rates = [rates[name, None] for name in variants[None]]
    decode = max(decode_rates, key=lambda rate: rate["median"])
    return [
        {
            "size": size,
            "rows": len(dataset.id),
            "variant": variant,
            "batch": batch,
            "images_per_s": rate,
            "ratio": harness.median_ratio(rate, decode),
        }
        for (variant, batch), rate in rates.items()
    ]


def _make_rate_fn(num_images: int, call: Callable[[], Any]) -> RateFn:
    return lambda: num_images / costs.measure_seconds(call)


def _make_decode_variants(
    paths: list[pathlib.Path], size: int, pool: ThreadPoolExecutor
) -> dict[str, RateFn]:
    def decode(path: pathlib.Path) -> Any:
        return images.decode(path.read_bytes(), size)

    variants = {PILLOW: lambda: _drain(pool.map(decode, paths))}
    try:
        decoded = jpeg_dataset(paths, size)
        variants["decode, tf.data"] = lambda: _drain(decoded.as_numpy_iterator())
    except UserError as error:  # TensorFlow is not installed
        print(f"decode, tf.data: {error}", file=sys.stderr)
    return {name: _make_rate_fn(len(paths), call) for name, call in variants.items()}


def _make_batch_variants(dataset: data.Dataset, batch: int) -> dict[str, RateFn]:
    rows = np.arange(len(dataset.id))
    plan = plan_batches(rows, batch, max(1, _WINDOW_ROWS // batch), seed=0)
    names = ("text", "labels", "has_image", "has_text")
    columns = {name: getattr(dataset, name) for name in names}
    image = device_tables.HostColumn(dataset.image, dataset.has_image)
    host, pixels = {**columns, "image": image}, np.asarray(dataset.image)
    variants: dict[str, Callable[[], Any]] = {
        MEMORY_MAP: lambda: _drain(iterate_batches(host, plan)),
        "numpy take": lambda: _drain(pixels.take(rows, axis=0) for rows in plan),
    }
    executor = pmap()
    if batch % executor.num_devices == 0:
        variants["send from host"] = _make_gather(executor, host, plan)
        if fits_on_devices(dataset.image.nbytes):
            table = {**columns, "image": pixels}
            variants["gather on device"] = _make_gather(executor, table, plan)
    return {name: _make_rate_fn(plan.size, call) for name, call in variants.items()}


def _drain(iterable: Iterable[Any]) -> None:
    for _ in iterable:
        pass


def _make_gather(
    executor: Executor, table: dict[str, Any], plan: np.ndarray
) -> Callable[[], None]:
    """Returns a function that gathers the rows of every batch in `plan` on device."""
    # Executors compile functions of the form (state, static inputs, sharded inputs).
    compiled = executor.compile(
        lambda state, columns, sent: (state, device_tables.gather_rows(columns, sent))
    )
    static = executor.replicate(device_tables.device_columns(table))

    def gather() -> None:
        for rows in plan:
            sent = device_tables.send_rows(executor, table, rows)
            jax.block_until_ready(compiled((), static, sent)[1])

    return gather


_COUNT = harness.at_least(0)
_ROWS_HELP = "number of rows; 0 skips the data set"
_FLAGS = [
    *(Flag(f"--rows-{x}", _COUNT, n, _ROWS_HELP) for x, n in NUM_ROWS.items()),
    harness.names_flag("--only", PARTS, "", "parts to run"),
    Flag("--posters", harness.at_least(1), 200, "number of JPEG files to decode"),
    Flag("--dir", harness.parse_path, "runs/bench", "directory that keeps the data"),
    Flag("--records", bool, True, "also write TFDS records"),
]
_HELP = "preparing data sets, and images per second of the input pipeline"
COMMANDS = {"data": harness.Command(_HELP, _FLAGS, 7, measure)}
