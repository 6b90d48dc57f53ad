"""`python -m ccu_jax.benchmarks data`: preparing and feeding data sets."""

import argparse
import pathlib
import re
from typing import Any

from ccu_jax import data
from ccu_jax.benchmarks import feed as bench_feed
from ccu_jax.benchmarks import prepare as bench_prepare
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

HELP = "preparing data sets, and pictures a second after it"
FULL = {"mmimdb": 25_959, "fashion200k": 201_838}  # rows of the official editions
_FLAGS = {"mmimdb": "rows_mmimdb", "fashion200k": "rows_fashion"}
_FED = "mmimdb"  # whose pictures are fed
_FED_ROWS = {48: None, 224: 3000}  # at most; 224 pixels take 147 KiB a row
_MOST_GROWTH_MIB, _LEAST_SPEEDUP, _LEAST_OF_TAKE = 300, 10, 80


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    add = parser.add_argument
    for name, rows in FULL.items():
        short = _FLAGS[name].replace("_", "-")
        add(
            f"--{short}",
            metavar="N",
            type=_count,
            default=rows,
            help=f"rows of {name}'s sample edition, 0 leaves it out; default {rows}",
        )
    add("--no-records", action="store_true", help="prepare without TFDS records")
    add("--only", choices=("prepare", "feed"), help="one of the two measurements")
    add(
        "--dir",
        metavar="DIR",
        type=_folder,
        default=pathlib.Path("runs/bench"),
        help="where the samples are written and prepared; default runs/bench",
    )
    add("--windows", metavar="N", type=_count, default=7, help="default 7")
    add("--posters", metavar="N", type=_count, default=200, help="default 200")


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        UserError: which flag, and what it may be.
    """
    for name, flag in _FLAGS.items():
        rows, least = getattr(given, flag), editions.WRITERS[name].min_rows
        if rows and rows < least:
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag}: {rows} is below {least}; 0 leaves {name} out")
    if given.only != "prepare" and not given.rows_mmimdb:
        raise UserError("--rows-mmimdb: its rows are fed; 0 goes with --only prepare")
    for flag in ("windows", "posters"):
        if not getattr(given, flag):
            raise UserError(f"--{flag}: must be 1 or more")
    try:
        (given.dir / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir: {given.dir}: {error.strerror or error}") from error


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,8}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of rows or the like"
        )
    return int(text)


def _folder(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return pathlib.Path(text).expanduser()


# --- measuring ------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask for: `settings`, `prepare` and `feed`, a list each."""
    folder = given.dir / "data"
    rows = {name: getattr(given, flag) for name, flag in _FLAGS.items()}
    prepared, fed = [], []
    if given.only != "feed":
        for name, number in rows.items():
            if number:
                where = folder / f"{name}-{number}"
                found = bench_prepare.measure(name, number, where, not given.no_records)
                prepared.append(found | {"records": not given.no_records})
    if given.only != "prepare":
        for size, most in _FED_ROWS.items():
            number = min(rows[_FED], most or rows[_FED])
            loaded = _loaded(folder / f"{_FED}-{number}", number, size)
            posters = folder / f"posters-{given.posters}"
            bench_feed.write_posters(
                posters, folder / f"{_FED}-{number}" / "sample", given.posters
            )
            fed.append(bench_feed.measure(loaded, posters, given.windows))
    settings = rows | {"windows": given.windows, "posters": given.posters}
    return {"settings": settings, "prepare": prepared, "feed": fed}


def _loaded(folder: pathlib.Path, rows: int, size: int) -> data.Dataset:
    """The data set that is fed, prepared by this or an earlier measurement."""
    root, _ = bench_prepare.write_sample(_FED, rows, folder)
    workdir = folder / ("prepared" if size == bench_prepare.SIZE else f"of-{size}")
    settings = bench_prepare.settings(_FED, root, image_size=size, records=False)
    return data.load(settings, workdir, bench_prepare.Screen(f"{_FED}, {size} pixels"))


# --- what it is judged by -------------------------------------------------------------


def targets(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets as arguments of `bench.judge`, computed from the numbers alone."""
    found = []
    for of in measured["prepare"]:
        found += _preparing(of)
    for of in measured["feed"]:
        for way in of["ways"]:
            if way["way"] == bench_feed.FEED:
                found += _feeding(of["size"], way)
    return found


def _feeding(size: int, way: dict[str, Any]) -> list[dict[str, Any]]:
    at = f"{size} pixels, batch {way['batch']}"
    speedup, share = way["to_decode"], 100 * way["to_take"]
    what = f"{at}, feed to decoding each epoch"
    return [
        _target(what, speedup, ">=", _LEAST_SPEEDUP, "times"),
        _target(f"{at}, feed to numpy take", share, ">=", _LEAST_OF_TAKE, "%"),
    ]


def _preparing(of: dict[str, Any]) -> list[dict[str, Any]]:
    name, first = of["dataset"], of["first"]
    killed, resumed = of["killed"], of["resumed"]
    each = first["decodes"] / max(first["pictures"], 1)
    same = int(first["fingerprint"] == resumed["fingerprint"])
    return [
        _target(
            f"{name}, growth of memory from 1 % of the rows on",
            first["growth_mib"],
            "<=",
            _MOST_GROWTH_MIB,
            "MiB",
        ),
        _target(f"{name}, decodings of a picture", each, "==", 1),
        _target(
            f"{name}, decodings at a second start", of["second"]["decodes"], "==", 0
        ),
        _target(
            f"{name}, rows done again after a kill",
            done_again(killed, resumed),
            "<=",
            of["part_rows"],
        ),
        _target(f"{name}, after a kill the same data (1: yes)", same, "==", 1),
    ]


def done_again(killed: dict[str, Any], resumed: dict[str, Any]) -> int:
    """How many rows a killed start had done that the next one did once more."""
    went_on = resumed["first_row"]
    return 0 if went_on is None else max(0, killed["last_row"] - went_on + 1)


def _target(name, value, sign, bound, unit="") -> dict[str, Any]:
    return {"name": name, "value": value, "sign": sign, "bound": bound, "unit": unit}


# --- how it is shown ------------------------------------------------------------------


def tables(measured: dict[str, Any]) -> list[tuple]:
    """The arguments of `bench.Table`, for each part that was measured."""
    found = []
    if measured["prepare"]:
        found.append(_prepare_table(measured["prepare"]))
    return found + [_feed_table(of) for of in measured["feed"]]


def _prepare_table(prepared: list[dict[str, Any]]) -> tuple:
    columns = [_column(of) for of in prepared]
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    notes = []
    if any(of["first"]["growth_mib"] is None for of in prepared):
        notes.append("memory is measured where there is /proc (Linux), so not here")
    header = ["", *(of["dataset"] for of in prepared)]
    return (
        "preparing the sample editions, in processes of their own",
        header,
        lines,
        notes,
    )


def _column(of: dict[str, Any]) -> dict[str, str]:
    """A column of the table, by the names of its lines."""
    first, second, killed, resumed = (
        of[start] for start in ("first", "second", "killed", "resumed")
    )
    stages = [first["stages_s"].get(stage, 0.0) for stage in bench_prepare.STAGES]
    reading, tokenising, near = *stages[:2], sum(stages[2:])
    sample_s = of["sample_s"]
    same = first["fingerprint"] == resumed["fingerprint"]
    return {
        "rows": f"{first['rows']:,}",
        "writing the sample, s": "was there"
        if sample_s is None
        else f"{sample_s:,.1f}",
        "preparing, s": f"{first['seconds']:,.1f}",
        "  reading and decoding, s": f"{reading:,.1f}",
        "  tokenising, s": f"{tokenising:,.1f}",
        "  near-duplicates, s": f"{near:,.1f}",
        "  opening, hashing and the rest, s": f"{first['seconds'] - sum(stages):,.1f}",
        "rows a second": f"{first['rows'] / first['seconds']:,.0f}",
        "on the disk, MiB": f"{first['stored_mib']:,.0f}",
        "memory at 1 % of the rows, MiB": _mib(first["early_mib"]),
        "memory at most, MiB": _mib(first["peak_mib"]),
        "  growth between, MiB": _mib(first["growth_mib"]),
        "pictures": f"{first['pictures']:,}",
        "  decodings": f"{first['decodes']:,}",
        "second start, s": f"{second['seconds']:,.2f}",
        "  decodings then": f"{second['decodes']:,}",
        "killed behind row": f"{killed['last_row']:,}",
        "  went on at row": f"{resumed['first_row'] or 0:,}",
        "  rows done again": f"{done_again(killed, resumed):,}",
        "  decodings after it": f"{resumed['decodes']:,}",
        "  then prepared in, s": f"{resumed['seconds']:,.1f}",
        "  same data as without a kill": "yes" if same else "NO",
    }


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _feed_table(of: dict[str, Any]) -> tuple:
    lines = [
        [
            way["way"],
            str(way["batch"] or ""),
            f"{way['median']:,.0f}",
            f"{way['low']:,.0f} to {way['high']:,.0f}",
            f"{way['to_decode']:,.1f}",
            f"{100 * way['to_take']:.0f}" if way["to_take"] else "",
        ]
        for way in of["ways"]
    ]
    windows = len(of["ways"][0]["windows"])
    notes = [
        f"{of['rows']:,} rows, {of['image_mib']:,.0f} MiB of pictures; decoded are "
        f"{of['posters']} posters of {of['poster_mb']:.2f} MB each; medians of "
        f"{windows} windows in turn, files in memory",
        *of["notes"],
    ]
    title = f"pictures a second at {of['size']} pixels a side, in one process"
    header = ("way", "batch", "pictures/s", "range", "x decode", "% of take")
    return title, header, lines, notes
