"""The flags of the command line: what there is, and what each may be.

Read by `launch.py` alone.
"""

import argparse
import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import NoReturn

import ccu_jax
from ccu_jax.config.loading import available_configs
from ccu_jax.errors import UserError

TIERS = ("none", "smoke", "standard", "rigorous")  # of audits, see auditing.py

_EXAMPLES = """\
examples:
  python -m ccu_jax.launch --config mmimdb
  python -m ccu_jax.launch --config mmimdb --data-dir ~/mmimdb --seeds 0,1,2
  python -m ccu_jax.launch --config clipart --methods retrain,ccu --unlearn random:0.05
  python -m ccu_jax.launch --config my/own.py --set train.epochs=3
  python -m ccu_jax.launch --config tiny --devices 4
  once per host of a pod:
  python -m ccu_jax.launch --config mmimdb --multihost
  python -m ccu_jax.launch --config mmimdb --multihost 10.0.0.1:9911 2 0

A run that was stopped goes on when the same command is given again.
"""


class Parser(argparse.ArgumentParser):
    """One whose errors are `UserError`, in one line."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise UserError(f"{message}; --help lists the flags")


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags.

    Args:
        argv: As given; those of the process by default.

    Raises:
        UserError: a flag that there is not, or a value that it cannot have.
    """
    parser = Parser(
        prog="python -m ccu_jax.launch",
        description="Trains a classifier, makes it forget pictures, audits the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="a name of --list, or a file.py")
    add(
        "--workdir",
        metavar="DIR",
        type=_path,
        help="results, shared by all hosts; default runs/<config>",
    )
    add("--data-dir", metavar="DIR", type=_path, help="the files of the data set")
    add("--methods", metavar="A,B|all", type=_names, help="instead of the config's")
    add("--seeds", metavar="0,1", type=_numbers, help="instead of the config's")
    add(
        "--unlearn",
        metavar="RULE",
        help="random:, cluster: or memorised:SHARE, class: or group:NAME, ids:FILE",
    )
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a field of the config (train.epochs=3); may be repeated",
    )
    add(
        "--multihost",
        nargs="*",
        metavar=("ADDRESS COUNT INDEX", ""),
        help="join the other hosts; without values where the cluster tells them",
    )
    add("--purge", action="store_true", help="then remove the forgotten pictures")
    add(
        "--audit",
        metavar="TIER",
        choices=TIERS,
        help=f"how thoroughly: {', '.join(TIERS)}; default smoke",
    )
    add(
        "--shadows",
        metavar="N",
        type=_even,
        help="shadow models of --audit rigorous, even, from 6 on; default 16",
    )
    add(
        "--tune",
        metavar="TRIALS",
        type=_count,
        help="instead: look for settings of the methods, on these seeds",
    )
    add(
        "--ablate",
        action="store_true",
        help="instead: what each part of the forms of CCU is worth",
    )
    add("--devices", metavar="N", type=_count, help="simulate N devices on the CPU")
    add("--list", action="store_true", help="configs, methods and data sets")
    add("--version", action="version", version=f"ccu_jax {ccu_jax.__version__}")
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for s in parser._option_string_actions if s.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]!r}{meant}")
    if flags.purge + bool(flags.tune) + flags.ablate > 1:
        raise UserError("--purge, --tune and --ablate do not go together: give one")
    if (flags.audit or flags.shadows) and (flags.tune or flags.ablate):
        raise UserError("--tune and --ablate audit nothing: no --audit, no --shadows")
    if flags.shadows and flags.audit != "rigorous":
        raise UserError("--shadows is for --audit rigorous: give both")
    flags.audit, flags.shadows = flags.audit or TIERS[1], flags.shadows or 16
    if not (flags.config or flags.list):
        raise UserError(
            f"--config is missing; there are {', '.join(available_configs())}, "
            "or give a path that ends in .py"
        )
    return flags


def _path(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return pathlib.Path(text).expanduser()


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count from 1 to 999")
    return int(text)


def _even(text: str) -> int:
    # Each is a target in turn, and without it and its like a row needs two a side.
    if not re.fullmatch("[1-9][0-9]{0,2}", text) or int(text) < 6 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number from 6 on")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not whole numbers with commas between, as 0,1,2"
        ) from None


def hosts(values: Sequence[str] | None) -> dict[str, str | int] | None:
    """Reads the values of --multihost; None without the flag."""
    if not values:
        return None if values is None else {}
    if len(values) != 3 or not all(re.fullmatch("[0-9]+", v) for v in values[1:]):
        raise UserError(
            "--multihost takes no value or three, ADDRESS:PORT COUNT INDEX; there is "
            + repr(" ".join(values))
        )
    address, count, index = values[0], int(values[1]), int(values[2])
    name, _, port = address.rpartition(":")
    if not re.fullmatch(r"\S+", name) or not re.fullmatch("[0-9]{1,5}", port):
        raise UserError(f"--multihost: {address!r} is not ADDRESS:PORT")
    if not 0 < int(port) < 1 << 16:
        raise UserError(f"--multihost: there is no port {port}; give one of 1 to 65535")
    if index >= count:
        raise UserError(f"--multihost: INDEX {index} is not below COUNT {count}")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }
