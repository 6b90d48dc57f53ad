"""`python -m ccu_jax.benchmarks scale`: how what steps and runs cost grows.

Three measurements: steps on simulated devices and in several processes
(`bench_scale_devices`), whole runs as one size at a time grows (`bench_scale_sizes`),
and a request beside more and more stored rows (`bench_scale_store`).
"""

import argparse
import pathlib
from typing import Any

from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import scale_devices as bench_scale_devices
from ccu_jax.benchmarks import scale_sizes as bench_scale_sizes
from ccu_jax.benchmarks import scale_store as bench_scale_store
from ccu_jax.benchmarks.harness import screen
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS

HELP = "how costs grow: devices, processes, sets, classes, pictures, stored rows"
PARTS = ("devices", "sizes", "store")
_FIT = 0.2  # no run of the sweep is further from the line than this share of itself
_BESIDE = 1.25  # a request beside the most stored rows, to one beside the fewest
_MEMORY_MIB = 300  # that the most stored rows may add
_MOST = 16  # devices: the smallest batch is cut into as many parts
_EXECUTORS = tuple(name for name in EXECUTORS if name != "vmap")


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    add = parser.add_argument
    add("--preset", choices=tuple(bench_problem.PRESETS), default="clipart")
    add("--executor", choices=_EXECUTORS, default="pmap")
    add("--only", metavar="A,B", default=",".join(PARTS), help="default all of them")
    for name, default, what in (
        ("devices", (1, 2, 4, 8), "simulated devices"),
        ("processes", (1, 2), "processes that share them"),
        ("stored", (1000, 10_000, 100_000, 1_000_000), "stored rows"),
    ):
        add(
            f"--{name}",
            metavar="N,N",
            type=_counts,
            default=default,
            help=f"numbers of {what}; default {','.join(map(str, default))}",
        )
    add(
        "--methods",
        metavar="A,B",
        default=",".join(bench_scale_devices.NAMES),
        help="whose steps run on several devices; default %(default)s",
    )
    add("--windows", metavar="N", type=int, default=7, help="of each; default 7")
    add(
        "--dir",
        metavar="DIR",
        type=lambda text: pathlib.Path(text).expanduser(),
        default=pathlib.Path("runs"),
        help="where the stores lie while they are measured; default runs",
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        UserError: which flag, and what it may be.
    """
    for part in given.only.split(","):
        if part not in PARTS:
            raise UserError(f"--only: {part!r} is none of {', '.join(PARTS)}")
    for name in given.methods.split(","):
        if name not in METHODS:
            raise UserError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    if given.windows < 1:
        raise UserError("--windows: must be 1 or more")
    for name in ("devices", "processes"):
        if getattr(given, name)[0] != 1:
            raise UserError(
                f"--{name}: 1 must be among them, others are compared to it"
            )
    least = bench_scale_store.LEAST
    if given.stored[0] < least or len(given.stored) < 2:
        raise UserError(f"--stored: give two numbers or more, from {least:,} on")
    for name in ("devices", "processes"):
        for number in getattr(given, name):
            if not 1 <= number <= _MOST or number & (number - 1):
                raise UserError(
                    f"--{name}: {number} is no power of two from 1 to {_MOST}"
                )
    if given.processes[-1] > given.devices[-1]:
        raise UserError(
            f"--processes: {given.processes[-1]} processes cannot share "
            f"{given.devices[-1]} devices"
        )
    if "sizes" in given.only.split(",") and given.preset == "vit_b16":
        raise UserError(
            "--preset vit_b16: its pictures at twice the size do not fit into memory; "
            "give --only devices,store"
        )
    if "store" in given.only.split(","):
        try:
            given.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--dir: cannot make {given.dir}: {error.strerror}"
            ) from None
        bench_scale_store.check(given.preset, given.stored, given.dir)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What `--only` names; None for what it leaves out."""
    preset, windows = given.preset, given.windows
    calls = {
        "devices": lambda tell: bench_scale_devices.measure(
            preset,
            given.executor,
            given.devices,
            given.processes,
            windows,
            tell,
            given.methods.split(","),
        ),
        "sizes": lambda tell: bench_scale_sizes.measure(
            preset, given.executor, windows, tell
        ),
        "store": lambda tell: bench_scale_store.measure(
            preset, given.stored, windows, given.dir, tell
        ),
    }
    wanted = given.only.split(",")
    found = {
        name: call(screen(f"scale, {name}")) if name in wanted else None
        for name, call in calls.items()
    }
    return {"preset": preset, **found}


def targets(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What unlearning may cost as its sets and the stored rows grow."""
    fit, beside, more = None, None, None
    if measured["sizes"]:
        fit = _line(measured["sizes"], bench_scale_sizes.PASSES)["apart"]
    rows = "the most stored rows"
    if measured["store"]:
        last = measured["store"]["sizes"][-1]
        rows = f"{last['rows']:,} stored rows"
        beside = last["to_first"]["median"]
        more = last["memory_mib"]["more"]
    name = "ccu_plus, passes over 1 to 30 % of the rows: furthest from a line in rows"
    return [
        {"name": name, "value": fit, "sign": "<=", "bound": _FIT},
        {
            "name": f"ccu_plus beside {rows}, to the fewest",
            "value": beside,
            "sign": "<=",
            "bound": _BESIDE,
        },
        {
            "name": f"memory that requests beside {rows} take more",
            "value": more,
            "sign": "<=",
            "bound": _MEMORY_MIB,
            "unit": "MiB",
        },
    ]


def _line(points, sweep):
    of = [point for point in points if point["sweep"] == sweep]
    return bench_scale_sizes.line(
        [point["value"] for point in of], [point["seconds"]["median"] for point in of]
    )


# --- tables ---------------------------------------------------------------------------


def tables(measured: dict[str, Any]) -> list[tuple]:
    """One for each measurement that was made."""
    drawn = {"devices": _devices, "sizes": _sizes, "store": _store}
    return [
        draw(measured[name], measured["preset"])
        for name, draw in drawn.items()
        if measured[name]
    ]


def _devices(told, preset):
    header = ("step", "scaling", "devices", "processes", "batch, relative")
    header += ("ms", "low", "high", "to one device", "of that cutting")
    header += ("collectives %", "waiting %")
    lines = []
    for of in told["cases"]:
        cut = of["cut_to_one"]
        lines.append(
            (
                of["method"],
                of["scaling"],
                str(of["devices"]),
                str(of["processes"]),
                f"{of['batch']:g}",
                *_three(of["ms"]),
                f"{of['to_one']['median']:.2f}",
                f"{cut['median']:.2f}" if cut else "",
                *(_percent(of[name]) for name in ("collectives", "waiting")),
            )
        )
    notes = [
        f"{told['steps']} steps in one call, on the CPU; all devices share its cores",
        "to one device: the same work on one; cutting: one device that computes in as "
        "many shares",
        "strong: the configured batch is cut; weak: it grows with the devices",
    ]
    title = f"{preset}: steps on simulated devices, {told['executor']}"
    return title, header, lines, notes


def _three(spread, scale=1.0, form=".2f"):
    return [f"{scale * spread[name]:{form}}" for name in ("median", "low", "high")]


def _percent(share):
    return "" if share is None else f"{100 * share:.1f}"


def _mib(value):
    return "" if value is None else f"{value:,.0f}"


def _sizes(points, preset):
    header = ("swept", "size", "features", "steps", "start ms", "steps ms")
    header += ("run ms", "low", "high", "a step ms")
    lines = []
    for of in points:
        steps_ms = 1e3 * of["steps_s"]["median"]
        lines.append(
            (
                of["sweep"],
                f"{of['value']:,}",
                of["features"],
                str(of["steps"]),
                f"{1e3 * of['start']['median']:.1f}",
                f"{steps_ms:.1f}",
                *_three(of["seconds"], 1e3, ".1f"),
                f"{steps_ms / of['steps']:.2f}",
            )
        )
    notes = []
    for sweep in (bench_scale_sizes.UNLEARN, bench_scale_sizes.PASSES):
        line = _line(points, sweep)
        notes.append(
            f"{sweep}: {1e3 * line['fixed_s']:.1f} ms and {1e6 * line['row_s']:.1f} "
            f"microseconds a row, r2 {line['r2']:.3f}, at most "
            f"{100 * line['apart']:.0f} % from it"
        )
    return f"{preset}: a run of ccu_plus as sizes grow", header, lines, notes


def _store(told, preset):
    header = ("stored rows", "disk MiB", "written s", "open ms", "start ms")
    header += ("steps ms", "run ms", "low", "high", "to the first")
    header += ("own MiB", "more", "mapped MiB")
    lines = [
        (
            f"{of['rows']:,}",
            f"{of['disk_mib']:,.0f}",
            f"{of['write_s']:.1f}",
            *(f"{1e3 * of[name]['median']:.1f}" for name in ("open", "start", "steps")),
            *_three(of["seconds"], 1e3, ".1f"),
            f"{of['to_first']['median']:.2f}",
            *(_mib(of["memory_mib"][name]) for name in ("own", "more", "mapped")),
        )
        for of in told["sizes"]
    ]
    note = (
        f"{told['unlearn']} rows to forget, {told['held']} held out, {told['retain']} "
        "retained; random features, on the CPU; own: the most memory during a "
        "request, and how much more than beside "
        f"{told['sizes'][0]['rows']:,} rows; mapped: pages of files, which the system "
        "has back when it wants them"
    )
    cached = "the stores were written just before, so the system still holds them"
    return f"{preset}: ccu_plus beside a growing store", header, lines, [note, cached]
