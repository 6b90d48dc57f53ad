"""Measures on this machine what README promises; numbers, not tests.

    python -m ccu_jax.benchmarks data --json data.json

A sub-command is a module of its own in COMMANDS, with HELP and these functions:
`flags(parser)` adds its flags, `check(flags)` refuses wrong ones, and `measure(flags)`
gives plain JSON, of which `tables` and `targets` make the arguments of `Table` and
`judge` below. A target that is missed is told and is no error.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ccu_jax.config.flags import Parser
from ccu_jax.errors import UserError, user_error_for

try:
    from ccu_jax.benchmarks import compilation as bench_compile
    from ccu_jax.benchmarks import input_pipeline as bench_data
    from ccu_jax.benchmarks import prepare as bench_prepare
    from ccu_jax.benchmarks import scaling as bench_scale
    from ccu_jax.benchmarks import steps as bench_step
    from ccu_jax.benchmarks import unlearning as bench_unlearn
except ModuleNotFoundError as missing:
    if __name__ != "__main__" or (missing.name or "ccu_jax").startswith("ccu_jax"):
        raise
    print(
        f"error: {missing.name} is not installed for {sys.executable}: activate the "
        "environment that ccu_jax was installed into, or `pip install .`",
        file=sys.stderr,
    )
    sys.exit(2)

COMMANDS = {
    "step": bench_step,
    "unlearn": bench_unlearn,
    "scale": bench_scale,
    "compile": bench_compile,
    "data": bench_data,
}
_CHILD = "_prepare"  # the process that only prepares, started by `data`
_PACKAGES = "jax jaxlib numpy scipy pillow tokenizers tensorflow tensorflow-cpu".split()
_SIGNS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class Table(NamedTuple):
    """What is printed: the first column is text, the others are numbers."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; gives the exit code 0, 2 (wrong input) or 130 (stopped).

    Args:
        argv: The flags; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == [_CHILD]:
            return bench_prepare.child(argv[1:])
        return _main(argv)
    except UserError as error:
        told = error
    except KeyboardInterrupt:
        if argv[:1] != [_CHILD]:  # else the one that has started it says so
            print("stopped; nothing was written about it", file=sys.stderr)
        return 130
    except Exception as error:
        told = user_error_for(error)
        if told is None:
            raise
    print(f"error: {' '.join(str(told).splitlines())}", file=sys.stderr)
    return 2


def _main(argv: Sequence[str]) -> int:
    flags = _flags(argv)
    command = COMMANDS[flags.command]
    _check_writable(flags.json)
    command.check(flags)
    facts = machine()
    print("\n".join(_head(facts)), flush=True)
    measured = command.measure(flags)
    judged = [judge(**target) for target in command.targets(measured)]
    for table in command.tables(measured):
        print(drawn(Table(*table)), end="", flush=True)
    print("\ntargets")
    print("\n".join(f"  {line}" for line in map(_verdict, judged)), flush=True)
    if flags.json:
        told = {"benchmark": flags.command, "machine": facts}
        told |= {"measured": measured, "targets": judged}
        text = json.dumps(told, indent=1, allow_nan=False) + "\n"
        temporary = flags.json.with_name(flags.json.name + ".new")
        temporary.write_text(text, "utf-8")
        temporary.replace(flags.json)
    return 0


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m ccu_jax.benchmarks",
        description="Measures speed and memory on this machine.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, allow_abbrev=False)
        added.add_argument(
            "--json",
            metavar="FILE",
            type=lambda text: pathlib.Path(text).expanduser(),
            help="also write all numbers there",
        )
        command.flags(added)
    flags = parser.parse_args(argv)
    if flags.command is None:
        parser.error(f"the command is missing: {' or '.join(COMMANDS)}")
    return flags


def _check_writable(path: pathlib.Path | None) -> None:
    """Refuses at once where nothing could be written at the end."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"--json: cannot write {path}; name a file in a folder there is"
        )


# --- the machine ----------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on: cores, devices, commit, versions of packages."""
    import jax

    from ccu_jax.runs import results as rows

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "memory_mib": _memory_mib(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "device": {"kind": device.device_kind, "count": jax.device_count()},
        "commit": rows.source_commit(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system tells
        return os.cpu_count()


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (AttributeError, ValueError, OSError):
        return None


def _head(facts: dict[str, Any]) -> list[str]:
    memory = f", {facts['memory_mib']:,} MiB" if facts["memory_mib"] else ""
    load = f", load {facts['load'][0]:.1f} before" if facts["load"] else ""
    device = facts["device"]
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    return [
        f"{facts['cpu']}, {facts['usable_cores']} of {facts['cores']} cores{memory}, "
        f"{facts['system']}{load}",
        f"JAX on {device['count']} x {device['kind']}; commit {facts['commit']}"
        + " (+: changed since)" * str(facts["commit"]).endswith("+"),
        ", ".join(versions),
    ]


# --- targets and tables ---------------------------------------------------------------


def judge(
    name: str, value: float | None, sign: str, bound: float, unit: str = ""
) -> dict[str, Any]:
    """A target with `reached`: whether `value sign bound`; None if not measured."""
    reached = None if value is None else bool(_SIGNS[sign](value, bound))
    return {
        "name": name,
        "value": value,
        "sign": sign,
        "bound": bound,
        "unit": unit,
        "reached": reached,
    }


def _verdict(target: dict[str, Any]) -> str:
    word = {True: "reached", False: "MISSED", None: "not measured"}[target["reached"]]
    unit = f" {target['unit']}" if target["unit"] else ""
    sign = {"==": "="}.get(target["sign"], target["sign"])
    line = f"{word:12} {target['name']}: target {sign} {target['bound']:,g}{unit}"
    return line if target["value"] is None else f"{line}, is {_short(target['value'])}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.4g}"


def drawn(table: Table) -> str:
    """A table as lines of text; one without lines says so in its notes alone."""
    lines = [list(table.header), *map(list, table.lines)] if table.lines else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = [f"\n{table.title}"]
    for line in lines:
        first, *others = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        told.append("  ".join(["  " + first, *others]).rstrip())
    told += [f"  {note}" for note in table.notes]
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    sys.exit(main())
