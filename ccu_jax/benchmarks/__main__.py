"""Runs a benchmark: `python -m ccu_jax.benchmarks unlearn --json unlearn.json`."""

import argparse
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ccu_jax.benchmarks.harness import Command, Flag, at_least, make_table, parse_path
from ccu_jax.config.flags import Parser
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.storage.files import to_plain_json, write_atomically

MODULES = ("steps", "unlearning", "scaling", "input_pipeline")  # each defines COMMANDS
_MIN_WIDTH = 160  # characters; tables would wrap in narrower pipes and files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns the exit code: 0, 2 on `UserError`, 130 on Ctrl-C."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        message = error if isinstance(error, UserError) else user_error_for(error)
        if message is None:
            raise
        print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
        return 2
    return 0


def run(argv: Sequence[str]) -> None:
    """Runs the benchmark that `argv` selects, prints its tables and writes the JSON."""
    commands: dict[str, Command] = {}
    for module in MODULES:
        commands |= _import(module).COMMANDS
    flags = _parse(argv, commands)
    machine = _import("costs").describe_machine()
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    for key, value in machine.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    measurements = commands[flags.command].measure(flags)
    for table in measurements:
        console.print(make_table(table))
    if flags.json:
        rows = {table.name: table.rows for table in measurements}
        record = {"flags": vars(flags), "machine": machine, "measured": rows}
        text = json.dumps(to_plain_json(record), indent=1) + "\n"
        write_atomically(flags.json, text.encode())


def _import(module: str) -> Any:
    # Lazy: child processes import this file, and the one of PyTorch must not load JAX.
    return importlib.import_module(f"ccu_jax.benchmarks.{module}")


def _parse(argv: Sequence[str], commands: dict[str, Command]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m ccu_jax.benchmarks",
        description="Measures speed and memory usage on this machine.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        repeat = Flag("--windows", at_least(1), command.windows, "samples per variant")
        file = Flag("--json", _parse_output, None, "also write all numbers to a file")
        for name, parse, default, help_text in (*command.flags, repeat, file):
            options: dict[str, Any] = {"type": parse}
            if parse is bool:
                options = {"action": argparse.BooleanOptionalAction}
            subparser.add_argument(name, default=default, help=help_text, **options)
    flags = parser.parse_args(argv)
    if flags.command is None:
        parser.error(f"command: missing; choose from {', '.join(commands)}")
    return flags


def _parse_output(text: str) -> pathlib.Path:
    # Checked before measuring, which may take hours.
    path = parse_path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"cannot write {text!r}; name a file in a writable folder"
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
