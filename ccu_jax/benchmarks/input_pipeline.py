"""`python -m ccu_jax.benchmarks data`: preparing data sets and feeding them.

`prepare`: seconds of each stage and memory, in a child process, at the sizes of the
official editions. `feed`: images per second that reach a step, by several ways, all
from files in the page cache.
"""

import argparse
import dataclasses
import io
import os
import pathlib
import re
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
from ccu_jax.benchmarks.harness import (
    Child,
    Progress,
    measure_in_turn,
    median_ratio,
    memory_mib,
    serve,
    summarize,
)
from ccu_jax.config import Data
from ccu_jax.config.loading import load_config
from ccu_jax.data import batches
from ccu_jax.data.input_pipeline import iterate_batches, jpeg_dataset
from ccu_jax.data.preparation import images
from ccu_jax.data.samples import editions
from ccu_jax.distributed import device_tables
from ccu_jax.distributed.executors import EXECUTORS, fits
from ccu_jax.errors import UserError

HELP = "preparing data sets, and images per second of the input pipeline"
ROWS = {"mmimdb": 25_959, "fashion200k": 201_838}  # of the official editions
FED = "mmimdb"
BATCHES = (64, 256)
PILLOW, TF_DATA = "decode, Pillow", "decode, tf.data"
FEED, TAKE = "memory map", "numpy take"
DEVICE, HOST = "gather on device", "send from host"
_IMAGE_SIZES = {48: None, 224: 3000}  # pixels: most rows, for 224 take 147 KiB each
_POSTER = (675, 1000)  # pixels of a typical official poster
_NOISE, _QUALITY = 14, 90  # make it a JPEG of about 0.3 MB
_WINDOW_ROWS = 4096
_EARLY_FRACTION = 0.01  # memory should hardly grow after this fraction of the rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    for name, rows in ROWS.items():
        add(f"--rows-{name}", metavar="N", type=_count, default=rows, help="0: none")
    add("--only", choices=("prepare", "feed"), help="one of the two measurements")
    add("--no-records", action="store_true", help="prepare without TFDS records")
    add("--posters", metavar="N", type=_count, default=200, help="default 200")
    add("--windows", metavar="N", type=_count, default=7, help="default 7")
    add(
        "--dir",
        metavar="DIR",
        type=lambda text: pathlib.Path(text).expanduser(),
        default=pathlib.Path("runs/bench"),
        help="where samples are written and prepared; default runs/bench",
    )


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError on flags that cannot be measured."""
    for name in ROWS:
        rows, min_rows = getattr(flags, f"rows_{name}"), editions.WRITERS[name].min_rows
        if rows and rows < min_rows:
            raise UserError(
                f"--rows-{name}: {rows} is below {min_rows}; 0 leaves it out"
            )
    if flags.only != "prepare" and not flags.rows_mmimdb:
        raise UserError("--rows-mmimdb: 0 needs --only prepare, its rows are fed")
    for flag in ("windows", "posters"):
        if not getattr(flags, flag):
            raise UserError(f"--{flag}: must be at least 1")
    try:
        flags.dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir: {flags.dir}: {error.strerror}") from None


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures both parts, or the one that --only names."""
    measured: dict[str, Any] = {"prepare": [], "feed": []}
    if flags.only != "feed":
        for name in ROWS:
            if rows := getattr(flags, f"rows_{name}"):
                measured["prepare"].append(
                    measure_preparation(name, rows, flags.dir, not flags.no_records)
                )
    if flags.only != "prepare":
        for size, max_rows in _IMAGE_SIZES.items():
            rows = min(flags.rows_mmimdb, max_rows or flags.rows_mmimdb)
            root = write_sample(FED, rows, flags.dir)
            settings = _settings(FED, root, image_size=size, records=False)
            progress = Progress(f"{FED}, {size} pixels")
            dataset = data.load(settings, flags.dir / f"{FED}-{rows}-{size}", progress)
            posters = flags.dir / f"posters-{flags.posters}"
            write_posters(posters, root, flags.posters)
            measured["feed"].append(measure_feed(dataset, posters, flags.windows))
    return measured


def write_sample(name: str, rows: int, folder: pathlib.Path) -> pathlib.Path:
    """Writes a sample edition unless it exists, and returns its folder."""
    root = folder / f"sample-{name}-{rows}"
    editions.ensure(name, root, rows, 0, Progress(name))
    return root


def _settings(name: str, root: pathlib.Path, **fields: Any) -> Data:
    return dataclasses.replace(load_config(name).data, dir=str(root), **fields)


# --- preparing ------------------------------------------------------------------------


def measure_preparation(
    name: str, rows: int, folder: pathlib.Path, records: bool
) -> dict[str, Any]:
    """Prepares a sample edition, and opens it a second time.

    Args:
        name: the data set.
        rows: of its sample edition.
        folder: for sample and prepared data; what an earlier run prepared is removed.
        records: whether TFDS records are kept.

    Returns:
        `name`, and for `first` and `second`: `seconds`, `stages_s`, `rows`,
        `early_mib` and `peak_mib` (resident memory; None off Linux), `stored_mib`.
    """
    root, workdir = write_sample(name, rows, folder), folder / f"prepared-{name}"
    shutil.rmtree(workdir, ignore_errors=True)
    result: dict[str, Any] = {"name": name}
    for start in ("first", "second"):
        spec = {
            "title": f"{name}, {start} start",
            "name": name,
            "root": str(root),
            "workdir": str(workdir),
            "records": records,
        }
        module = "ccu_jax.benchmarks.input_pipeline"
        child = Child(spec["title"], module, spec, folder, {})
        try:
            child.answer()
            result[start] = child.ask()
        finally:
            child.close()
    return result


class _StageClock:
    """A progress callback that adds up the seconds of each stage."""

    def __init__(self, title: str):
        self._print, self._stage, self._last = Progress(title), "open", time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.early_mib: float | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.seconds[self._stage] += now - self._last
        self._stage, self._last = stage, now
        if self.early_mib is None and done >= _EARLY_FRACTION * total:
            self.early_mib = memory_mib("VmRSS")
        self._print(stage, done, total)


def _prepare_child(spec: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def answer() -> dict[str, Any]:
        clock, start = _StageClock(spec["title"]), time.monotonic()
        root, workdir = pathlib.Path(spec["root"]), pathlib.Path(spec["workdir"])
        settings = _settings(spec["name"], root, records=spec["records"])
        dataset = data.load(settings, workdir, clock)
        files = [file for file in (workdir / "data").iterdir() if file.is_file()]
        return {
            "seconds": time.monotonic() - start,
            "stages_s": dict(clock.seconds),
            "rows": len(dataset.id),
            "early_mib": clock.early_mib,
            "peak_mib": memory_mib("VmHWM"),
            "stored_mib": sum(file.stat().st_size for file in files) / 2**20,
        }

    return answer


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
            image = image.convert("RGB").resize(_POSTER, Image.Resampling.BICUBIC)
        noise = rng.normal(0, _NOISE, (*image.size[::-1], 1)).astype(np.float32)
        pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=_QUALITY)
        (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())


def measure_feed(
    dataset: data.Dataset, posters: pathlib.Path, windows: int
) -> dict[str, Any]:
    """Measures images per second of every way, in turn.

    Args:
        dataset: prepared; the side of its images is what posters are decoded to.
        posters: folder of JPEG files.
        windows: measurements of each way.

    Returns:
        `size` in pixels, `rows`, and `rates`: way, batch and images per second.
    """
    size, paths = dataset.image.shape[1], sorted(posters.glob("*.jpg"))
    calls: dict[tuple[str, int], Callable[[], float]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        calls[PILLOW, 0] = _timed(
            len(paths),
            lambda: list(
                pool.map(lambda p: images.decode(p.read_bytes(), size), paths)
            ),
        )
        try:
            decoded = jpeg_dataset(paths, size)
            calls[TF_DATA, 0] = _timed(
                len(paths), lambda: list(decoded.as_numpy_iterator())
            )
        except UserError as error:
            print(f"{TF_DATA}: {error}", file=sys.stderr)
        for batch in BATCHES:
            for way, run in _batch_ways(dataset, batch).items():
                calls[way, batch] = run
        rates = measure_in_turn(calls, windows, Progress(f"{size} pixels"))
    return {
        "size": size,
        "rows": len(dataset.id),
        "rates": [
            {"way": way, "batch": batch, "images_per_s": summarize(values)}
            for (way, batch), values in rates.items()
        ],
    }


def _timed(rows: int, call: Callable[[], Any]) -> Callable[[], float]:
    def rate() -> float:
        start = time.perf_counter()
        call()
        return rows / (time.perf_counter() - start)

    return rate


def _batch_ways(dataset: data.Dataset, batch: int) -> dict[str, Callable[[], float]]:
    plan = batches.plan_batches(
        np.arange(len(dataset.id)), batch, max(1, _WINDOW_ROWS // batch), 0
    )
    columns = {
        name: getattr(dataset, name)
        for name in ("text", "labels", "has_image", "has_text")
    }
    host = columns | {
        "image": device_tables.HostColumn(dataset.image, dataset.has_image)
    }
    pixels = np.asarray(dataset.image)
    ways: dict[str, Callable[[], Any]] = {
        FEED: lambda: _drain(iterate_batches(host, plan)),
        TAKE: lambda: _drain(pixels.take(rows, axis=0) for rows in plan),
    }
    executor = EXECUTORS["pmap"]()
    if batch % executor.num_devices == 0:
        ways[HOST] = _gather(executor, host, plan)
        if fits(dataset.image.nbytes):
            ways[DEVICE] = _gather(executor, columns | {"image": pixels}, plan)
    return {way: _timed(plan.size, call) for way, call in ways.items()}


def _drain(iterable: Iterable[Any]) -> None:
    for _ in iterable:
        pass


def _gather(executor: Any, table: dict[str, Any], plan: np.ndarray) -> Callable:
    """Returns a call that gathers the rows of every batch on the devices."""
    # Executors compile functions of state, static inputs and sharded inputs.
    compiled = executor.compile(
        lambda state, columns, sent: (state, device_tables.gather_rows(columns, sent))
    )
    resident = executor.replicate(device_tables.device_columns(table))

    def call() -> None:
        for rows in plan:
            index = device_tables.send_rows(executor, table, rows)
            jax.block_until_ready(compiled((), resident, index)[1])

    return call


def tables(measured: dict[str, Any]) -> list[Table]:
    """Returns a table of preparation and one of rates for each image size."""
    result = []
    if measured["prepare"]:
        header = ("data set", "rows", "first s", "rows/s", "stages", "disk MiB")
        header += ("early MiB", "peak MiB", "second s")
        table = Table(*header, title="preparing the sample editions")
        for row in measured["prepare"]:
            first = row["first"]
            stages = (f"{stage} {s:.1f}" for stage, s in first["stages_s"].items())
            memory = (first["early_mib"], first["peak_mib"])
            table.add_row(
                row["name"],
                f"{first['rows']:,}",
                f"{first['seconds']:,.1f}",
                f"{first['rows'] / first['seconds']:,.0f}",
                "\n".join(stages),
                f"{first['stored_mib']:,.0f}",
                *("" if mib is None else f"{mib:,.0f}" for mib in memory),
                f"{row['second']['seconds']:.2f}",
            )
        result.append(table)
    for feed in measured["feed"]:
        title = f"images per second, {feed['size']} pixels, {feed['rows']:,} rows"
        table = Table("way", "batch", "median", "low", "high", "x decode", title=title)
        rates = [row["images_per_s"] for row in feed["rates"]]
        decode = [r["images_per_s"] for r in feed["rates"] if not r["batch"]]
        fastest = max(decode, key=lambda rate: rate["median"])
        for row, rate in zip(feed["rates"], rates, strict=True):
            table.add_row(
                row["way"],
                str(row["batch"] or ""),
                *(f"{rate[name]:,.0f}" for name in ("median", "low", "high")),
                f"{median_ratio(rate, fastest):.1f}",
            )
        result.append(table)
    return result


if __name__ == "__main__":
    serve(_prepare_child)
