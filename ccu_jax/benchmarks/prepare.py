"""Measures how a data set is prepared: time, memory, and going on after a kill.

Each measurement is a process that does nothing else, so that its memory is that of
preparing alone.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any, NoReturn

from ccu_jax import data
from ccu_jax.config.loading import load_config
from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

READING = "reading and decoding"
STAGES = (
    READING,
    "tokenising texts",
    "looking for near-duplicates",
    "comparing pictures that look alike",
)
SIZE = 48  # pixels a side, as in the configurations
# What messages call the four starts.
_TITLES = {
    "first": "first start",
    "second": "second start",
    "killed": "start that is killed at half",
    "resumed": "start after the kill",
}
_EARLY = 0.01  # share of the rows after which memory should not grow by much
_KILL_AT = 0.5
_TELL_EVERY_S = 2.0


def settings(dataset: str, root: pathlib.Path, **others: Any) -> Data:
    """What its configuration prepares a data set in the folder `root` with."""
    config = load_config(dataset, []).data
    return dataclasses.replace(config, dir=str(root), **{"image_size": SIZE} | others)


def write_sample(
    dataset: str, rows: int, folder: pathlib.Path
) -> tuple[pathlib.Path, float | None]:
    """The sample edition's folder, and the seconds it took; None: it was there."""
    root, began, calls = folder / "sample", time.perf_counter(), []
    screen = Screen(dataset)

    def progress(what: str, done: int, total: int) -> None:
        calls[:] = [done]
        screen(what, done, total)

    editions.ensure(dataset, root, rows, 0, progress)
    return root, time.perf_counter() - began if calls else None


def measure(
    dataset: str, rows: int, folder: pathlib.Path, records: bool
) -> dict[str, Any]:
    """Prepares a sample edition whole, again, and with a kill at the half.

    Args:
        dataset: A row of DATASETS that has a sample edition.
        rows: Number of its rows.
        folder: Where all of it lies; what an earlier measurement left is used (the
            sample) or removed.
        records: Whether TFDS records are kept as well, as the configurations do.

    Returns:
        `dataset`, `rows`, `sample_s`, and for each start (`first`, `second`, `killed`,
        `resumed`) what `child` has told.
    """
    root, sample_s = write_sample(dataset, rows, folder)
    found = {"dataset": dataset, "rows": rows, "sample_s": sample_s}
    for workdir, starts in (
        ("prepared", ("first", "second")),
        ("again", ("killed", "resumed")),
    ):
        shutil.rmtree(folder / workdir, ignore_errors=True)
        for name in starts:
            found[name] = _start(name, dataset, root, folder / workdir, records)
    shutil.rmtree(folder / "again", ignore_errors=True)
    return found | {"part_rows": parts.PART_ROWS}


def _start(name: str, dataset: str, root, workdir, records) -> dict[str, Any]:
    """One start of the process that prepares, until it ends or is killed."""
    command = [sys.executable, "-m", "ccu_jax.benchmarks", "_prepare"]
    kill_at = _KILL_AT if name == "killed" else None
    title, how = f"{dataset}, {_TITLES[name]}", json.dumps([kill_at, records])
    arguments = list(map(str, (title, dataset, root, workdir, how)))
    ended = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
    if ended.returncode == 130:
        raise KeyboardInterrupt
    if ended.returncode == 2 or not ended.stdout:
        raise UserError(f"preparing {dataset} failed; the reason stands above")
    if (ended.returncode != 0) != (kill_at is not None):
        raise UserError(
            f"preparing {dataset} ended with code {ended.returncode}, which is not "
            "what was asked for: remove the folder of --dir and try again"
        )
    return json.loads(ended.stdout)


def child(argv: list[str]) -> int:
    """The process that prepares and prints one line of JSON about it.

    Args:
        argv: what its messages begin with, the data set, its folder, the working
            folder, and as JSON: null or the share of the rows after which it kills
            itself, and whether it keeps records.
    """
    if len(argv) != 5:
        raise UserError("_prepare is for the sub-command `data` alone")
    title, dataset, root, workdir, how = argv
    kill_at, records = json.loads(how)
    watch = _Watch(Screen(title), kill_at)
    decode = pictures.decode

    def counted(*args, **kwargs):
        next(watch.decoded)
        return decode(*args, **kwargs)

    pictures.decode = counted
    where = pathlib.Path(workdir)
    config = settings(dataset, pathlib.Path(root), records=records)
    loaded = data.load(config, where, watch)
    told = {
        "rows": len(loaded.id),
        "pictures": int(loaded.has_image.sum()),
        "counts": loaded.counts,
        "edition": loaded.edition,
        "fingerprint": loaded.fingerprint,
        "stored_mib": sum(f.stat().st_size for f in (where / "data").iterdir()) / 2**20,
    }
    print(json.dumps(watch.told() | told))
    return 0


class _Watch:
    """A `Progress` that keeps the seconds of each stage, and looks at the memory."""

    def __init__(self, screen: "Screen", kill_at: float | None):
        self._screen, self._kill_at = screen, kill_at
        self.decoded = itertools.count()  # one step of it is safe among threads
        self._began = self._last = time.perf_counter()
        self._stages: dict[str, float] = defaultdict(float)
        self._peaks_mib: dict[str, float | None] = {}
        self._what, self._ended = "opening", False
        self._first = self._done = None
        self._early_mib: float | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        # What happens between two stages belongs to the one before.
        self._stages[self._what] += now - self._last
        if what != self._what:
            self._peaks_mib[self._what] = memory_mib("VmHWM")
        self._what, self._last, self._ended = what, now, done == total
        self._screen(what, done, total)
        if what != READING:
            return
        self._first, self._done = self._first or done, done
        if self._early_mib is None and done >= _EARLY * total:
            self._early_mib = memory_mib("VmRSS")
        if self._kill_at is not None and done >= self._kill_at * total:
            self._die()

    def told(self) -> dict[str, Any]:
        now = time.perf_counter()
        stage = "finishing" if self._ended else self._what
        stages = dict(self._stages)
        stages[stage] = stages.get(stage, 0.0) + now - self._last
        early, peak = self._early_mib, memory_mib("VmHWM")
        return {
            "seconds": now - self._began,
            "stages_s": stages,
            "peak_until_end_of_mib": self._peaks_mib,
            "decodes": next(self.decoded),  # as many as were counted before
            "first_row": self._first,
            "last_row": self._done,
            "early_mib": early,
            "peak_mib": peak,
            "growth_mib": None if None in (early, peak) else peak - early,
        }

    def _die(self) -> NoReturn:
        print(json.dumps(self.told()), flush=True)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        raise SystemExit("not killed")


def memory_mib(name: str) -> float | None:
    """This process's VmRSS (resident now) or VmHWM (at most so far); None: untold."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) / 1024
    except OSError:  # no Linux
        pass
    return None


class Screen:
    """A `Progress` that tells on stderr how far it is, how fast, and how long yet."""

    def __init__(self, title: str):
        """Each line begins with `title`."""
        self._title, self._what = title, ""
        self._told_s = self._began_s = time.monotonic()
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tells it now and then, at the beginning and end of each stage at least."""
        now = time.monotonic()
        if new := what != self._what:
            self._what, self._began_s, self._first = what, now, done
        if not new and done != total and now - self._told_s < _TELL_EVERY_S:
            return
        self._told_s = now
        words = [f"{self._title}: {what} {done:,}/{total:,}"]
        if done > self._first and now > self._began_s:
            rate = (done - self._first) / (now - self._began_s)
            words.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            if done < total:
                words.append(f"{(total - done) / rate:,.0f} s left")
        print(", ".join(words), file=sys.stderr, flush=True)
