"""The command-line flags of `ccu_jax.launch`."""

import argparse
import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import NoReturn

import ccu_jax
from ccu_jax.config.loading import available_configs
from ccu_jax.errors import UserError

_AUDIT_TIERS = ("none", "smoke", "standard", "rigorous")  # see audits/tiers.py
_DEFAULT_SHADOWS = 16

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

Rerun the same command to resume a run that was stopped.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as a one-line `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message instead of printing the usage."""
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses command-line flags, by default those of `sys.argv`.

    Raises:
        UserError: An unknown flag, an invalid value, or mutually exclusive flags.
    """
    parser = _make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [s for s in parser._option_string_actions if s.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown argument {unknown[0]!r}{hint}")
    if args.purge + bool(args.tune) + args.ablate > 1:
        raise UserError("--purge, --tune, --ablate: pass at most one of them")
    if (args.audit or args.shadows) and (args.tune or args.ablate):
        raise UserError("--audit, --shadows: not used by --tune, --ablate; drop them")
    if args.shadows and args.audit != "rigorous":
        raise UserError("--shadows: needs --audit rigorous; pass both")
    args.audit = args.audit or "smoke"
    args.shadows = args.shadows or _DEFAULT_SHADOWS
    if not (args.config or args.list):
        raise UserError(
            f"--config is missing; choose from {', '.join(available_configs())}, or "
            "pass a path that ends in .py"
        )
    return args


def _make_parser() -> Parser:
    parser = Parser(
        prog="python -m ccu_jax.launch",
        description="Trains a classifier, unlearns images, and audits the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", help="a name shown by --list, or a .py file")
    help_ = "folder of the results, shared by all hosts; default runs/<config>"
    add("--workdir", metavar="DIR", type=_parse_path, help=help_)
    add("--data-dir", metavar="DIR", type=_parse_path, help="files of the data set")
    add("--methods", metavar="A,B|all", type=_parse_names, help="overrides the config")
    add("--seeds", metavar="0,1", type=_parse_integers, help="overrides the config")
    help_ = "random:, cluster: or memorized:FRACTION, class: or group:NAME, ids:FILE"
    add("--unlearn", metavar="RULE", help=help_)
    help_ = "sets a field of the config (train.epochs=3); may be repeated"
    add("--set", metavar="KEY=VALUE", action="append", default=[], help=help_)
    help_ = "join the other hosts; without values on clusters that JAX detects"
    metavar = ("ADDRESS COUNT INDEX", "")
    add("--multihost", nargs="*", metavar=metavar, help=help_)
    add("--purge", action="store_true", help="remove the unlearned images afterwards")
    help_ = f"{', '.join(_AUDIT_TIERS)}; default smoke"
    add("--audit", metavar="TIER", choices=_AUDIT_TIERS, help=help_)
    help_ = f"shadow models of --audit rigorous; default {_DEFAULT_SHADOWS}"
    add("--shadows", metavar="N", type=_parse_shadow_count, help=help_)
    help_ = "tune the methods, with this many trials each, instead of running them"
    add("--tune", metavar="TRIALS", type=_parse_count, help=help_)
    add("--ablate", action="store_true", help="ablate CCU instead of running methods")
    add("--devices", metavar="N", type=_parse_count, help="simulate N CPU devices")
    add("--list", action="store_true", help="list configs, methods and data sets")
    add("--version", action="version", version=f"ccu_jax {ccu_jax.__version__}")
    return parser


def _parse_path(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("empty path")
    return pathlib.Path(text).expanduser()


def _parse_count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999")
    return int(text)


def _parse_shadow_count(text: str) -> int:
    # Each row is in the training set of half of the shadows. Each shadow is attacked
    # with the others, at least two trained on the row and at least two not.
    if (count := _parse_count(text)) < 6 or count % 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an even number of at least 6"
        )
    return count


def _parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parse_integers(text: str) -> list[int]:
    try:
        return [int(number) for number in _parse_names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 0,1,2"
        ) from None


def parse_hosts(values: Sequence[str] | None) -> dict[str, str | int] | None:
    """Converts the --multihost values to arguments of `jax.distributed.initialize`.

    `values` and the result are None without the flag, and empty if JAX is to detect the
    cluster.

    Raises:
        UserError: An invalid address, count or index.
    """
    if not values:
        return None if values is None else {}
    if len(values) != 3 or not all(re.fullmatch("[0-9]+", v) for v in values[1:]):
        raise UserError(
            f"--multihost: {' '.join(values)!r} is invalid; pass no value, or three: "
            "ADDRESS:PORT COUNT INDEX"
        )
    address, count, index = values[0], int(values[1]), int(values[2])
    match = re.fullmatch(r"\S+:([0-9]{1,5})", address)
    if not match or not 0 < int(match[1]) < 1 << 16:
        raise UserError(
            f"--multihost: {address!r} is not ADDRESS:PORT with a port in [1, 65535]"
        )
    if index >= count:
        raise UserError(f"--multihost: INDEX {index} must be below COUNT {count}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}
