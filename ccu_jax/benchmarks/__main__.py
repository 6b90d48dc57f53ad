"""Benchmarks of speed and memory; they print numbers and judge nothing.

    python -m ccu_jax.benchmarks unlearn --json unlearn.json

Each command is a module in COMMANDS with HELP and four functions: `add_flags(parser)`,
`check_flags(flags)`, `measure(flags)` returns plain JSON, `tables(measured)` returns
rich tables of it.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ccu_jax.config.flags import Parser
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.storage.files import write_atomically

COMMANDS = {
    "step": "steps",
    "unlearn": "unlearning",
    "scale": "scaling",
    "compile": "compilation",
    "data": "input_pipeline",
}
_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "pillow", "tokenizers")
_PACKAGES += ("tensorflow", "tensorflow-cpu", "torch")
_MIN_WIDTH = 160  # characters; narrower pipes and files would wrap the tables


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the flags; those of the process by default.

    Returns:
        The exit code: 0, 2 for wrong input, 130 if interrupted.
    """
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message = error
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_error_for(error)
        if message is None:
            raise
    else:
        return 0
    print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return 2


def run(argv: Sequence[str]) -> None:
    """Parses the flags, measures, prints the tables and writes the JSON."""
    commands = {
        name: importlib.import_module(f"ccu_jax.benchmarks.{module}")
        for name, module in COMMANDS.items()
    }
    flags = _parse(argv, commands)
    command = commands[flags.command]
    _check_writable(flags.json)
    command.check_flags(flags)
    machine = describe_machine()
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    for key, value in machine.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    measured = command.measure(flags)
    for table in command.tables(measured):
        console.print(table)
    if flags.json:
        record = {
            "benchmark": flags.command,
            "machine": machine,
            "flags": {k: str(v) for k, v in vars(flags).items()},
            "measured": measured,
        }
        write_atomically(flags.json, (json.dumps(record, indent=1) + "\n").encode())


def _parse(argv: Sequence[str], commands: dict[str, Any]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m ccu_jax.benchmarks",
        description="Measures speed and memory on this machine.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.HELP, allow_abbrev=False)
        subparser.add_argument(
            "--json",
            metavar="FILE",
            type=lambda text: pathlib.Path(text).expanduser(),
            help="also write all numbers to this file",
        )
        command.add_flags(subparser)
    flags = parser.parse_args(argv)
    if flags.command is None:
        parser.error(f"no command; choose from {', '.join(commands)}")
    return flags


def _check_writable(path: pathlib.Path | None) -> None:
    """Raises UserError before hours of measuring, not after."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(
            f"--json: cannot write {path}; name a file in a writable folder"
        )


def describe_machine() -> dict[str, Any]:
    """Returns what the numbers depend on: machine, load, devices, commit, versions."""
    # JAX reads the environment when it is imported, which children set anew.
    import jax

    from ccu_jax.runs import results

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "cpu": _read_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": _read_field("/proc/meminfo", "MemTotal"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "commit": results.source_commit(),
        "versions": versions,
    }


def _read_field(path: str, name: str) -> str | None:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
    return values[0] if values else None


if __name__ == "__main__":
    sys.exit(main())
