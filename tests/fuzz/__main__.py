"""Fuzzes the readers of data sets: hostile files may cause clear errors, nothing else.

    python -m tests.fuzz --cases 100000 --seed 0 mmimdb csv pictures

A case is what an enemy wrote. It is planted in a folder in memory, found, opened and
read as training does. Allowed are a row, a row that is left out for a reason, and an
error of one line. A number repeats a case: `--only 1234`.
"""

import argparse
import collections
import contextlib
import dataclasses
import pathlib
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers import untrusted_files as files
from tests.fuzz import archives as fuzz_archives
from tests.fuzz import pictures as fuzz_pictures
from tests.fuzz.checks import decode, read, unpack
from tests.fuzz.data_sets import CASES
from tests.fuzz.world import Failure, Hang, World, alarms, world

WHOLE = 0.01  # share of the cases that are also stored
STRICT = 0.1  # share of the cases in which a row that cannot be used is an error

Target = Callable[[World, random.Random], dict[str, int]]


def _archives(here: World, rng: random.Random) -> dict[str, int]:
    return unpack(here, fuzz_archives.archive(rng), rng.random() < STRICT)


def _pictures(here: World, rng: random.Random) -> dict[str, int]:
    data = fuzz_pictures.hostile_picture(rng)
    return decode(here, data, rng.choice((4, 8, 48)), rng.random() < 0.3)


def _data_set(name: str) -> Target:
    def run(here: World, rng: random.Random) -> dict[str, int]:
        strict, whole = rng.random() < STRICT, rng.random() < WHOLE
        return read(here, CASES[name](rng), strict=strict, whole=whole)

    return run


TARGETS: dict[str, Target] = {name: _data_set(name) for name in CASES}
TARGETS |= {"archives": _archives, "pictures": _pictures}


@dataclasses.dataclass
class Campaign:
    """What came of the cases of a target."""

    cases: int = 0
    outcomes: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    failures: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def campaign(
    target: str,
    numbers: range,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Campaign:
    """Runs cases of a target by their numbers.

    Args:
        target: a key of TARGETS.
        numbers: of the cases.
        seed: of all of them.
        tell: called with a line to print now and then, and at each new failure.
    """
    found, begun, told = Campaign(), time.monotonic(), time.monotonic()
    with world() as here, alarms(), _small_limits():
        for number in numbers:
            try:
                outcome = TARGETS[target](
                    here, random.Random(f"{seed}/{target}/{number}")
                )
            except (Exception, Hang) as error:
                at = _place(error)
                kind = f"{type(error).__name__} at {at}"
                if kind not in found.failures:
                    tell(f"FAILURE in case {number}\n" + traceback.format_exc()[-3000:])
                found.failures.setdefault(kind, []).append(number)
                outcome = {"failure": 1}
            here.clear()
            found.cases += 1
            found.outcomes.update(_kinds(outcome))
            if time.monotonic() - told > 20:
                told = time.monotonic()
                rate = found.cases / (told - begun)
                tell(f"{target}: {found.cases:,} cases, {rate:,.0f} a second")
    tell(f"{target}: {found.cases:,} cases in {time.monotonic() - begun:.0f} s")
    return found


def _place(error: BaseException) -> str:
    """Where it happened: the last line of the project's own, and what it said."""
    told = "" if isinstance(error, Hang) else f": {str(error)[:24]!a}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "ccu_jax" in frame.filename or isinstance(error, Failure):
            return f"{pathlib.Path(frame.filename).name}:{frame.lineno}{told}"
    return told


def _kinds(outcome: dict[str, int]) -> set[str]:
    """The kinds of things that happened in a case, without names and numbers."""
    kinds = set()
    for name in outcome:
        if " (data.strict is on" in name:
            name = "strict: " + name.partition(" (data.strict")[0].rpartition(": ")[2]
        elif name.startswith("error: "):
            name = re.sub(
                r"(?<=ROOT)\S*|(?<=WORK)\S*|'[^']*'|\"[^\"]*\"|\(.*\)", "", name
            )
            name = re.sub("[0-9][0-9,]*", "N", name)[:70]
        kinds.add(name)
    return kinds


@contextlib.contextmanager
def _small_limits() -> Iterator[None]:
    """Archives and lines are too large at a small size: the same code, much faster."""
    before = archive.MIN_LIMIT_BYTES, files.MAX_LINE_BYTES
    archive.MIN_LIMIT_BYTES, files.MAX_LINE_BYTES = 1 << 20, 3000
    try:
        yield
    finally:
        archive.MIN_LIMIT_BYTES, files.MAX_LINE_BYTES = before


def main() -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of a case to repeat")
    flags = parser.parse_args()
    first = flags.first if flags.only is None else flags.only
    numbers = range(first, first + (flags.cases if flags.only is None else 1))
    failed = 0
    for target in flags.targets:
        found = campaign(
            target, numbers, flags.seed, lambda line: print(line, flush=True)
        )
        for name, count in found.outcomes.most_common():
            print(f"{count:9,}  {ascii(name)[1:-1]}")
        for kind, where in found.failures.items():
            print(f"FAILURES {kind}: {len(where):,} cases, such as {where[:5]}")
        failed += len(found.failures)
    print(f"{failed} kinds of failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
