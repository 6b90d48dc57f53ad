"""Fuzzes the readers of data sets: hostile files may cause clear errors, nothing else.

    python -m tests.fuzz --cases 100000 --seed 0 mmimdb csv images

Each case is written to a folder in memory, found, opened and read as training does. It
may give a row, a skipped row, or an error of one line. Repeat a case by its number:
`--only 1234`.
"""

import argparse
import collections
import contextlib
import dataclasses
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from random import Random

from ccu_jax.data.readers import archives, untrusted_files
from tests.fuzz.archives import draw_archive
from tests.fuzz.checks import decode_image, read_case, unpack_archive
from tests.fuzz.contents import draw_hostile_image
from tests.fuzz.data_sets import CASES
from tests.fuzz.sandbox import Failure, Hang, Sandbox, make_sandbox

STORED_FRACTION = 0.01  # of the cases that are also prepared for training
STRICT_FRACTION = 0.1  # of the cases in which an unusable row is an error

Target = Callable[[Sandbox, Random], dict[str, int]]


def _fuzz_archive(sandbox: Sandbox, rng: Random) -> dict[str, int]:
    return unpack_archive(sandbox, draw_archive(rng), rng.random() < STRICT_FRACTION)


def _fuzz_image(sandbox: Sandbox, rng: Random) -> dict[str, int]:
    size, crop_margins = rng.choice((4, 8, 48)), rng.random() < 0.3
    return decode_image(sandbox, draw_hostile_image(rng), size, crop_margins)


def _data_set_target(name: str) -> Target:
    def run(sandbox: Sandbox, rng: Random) -> dict[str, int]:
        strict, store = rng.random() < STRICT_FRACTION, rng.random() < STORED_FRACTION
        return read_case(sandbox, CASES[name](rng), strict=strict, store=store)

    return run


TARGETS: dict[str, Target] = {name: _data_set_target(name) for name in CASES}
TARGETS |= {"archives": _fuzz_archive, "images": _fuzz_image}


@dataclasses.dataclass
class Campaign:
    """The outcomes of a target's cases, and the numbers of cases that failed."""

    outcomes: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    failures: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def run_campaign(
    target: str, numbers: range, seed: int, log: Callable[[str], None] = lambda _: None
) -> Campaign:
    """Runs cases of a target.

    Args:
        target: a key of TARGETS.
        numbers: of the cases.
        seed: of all cases.
        log: called with a line now and then, and with the traceback of a failure.
    """
    campaign, start_s = Campaign(), time.monotonic()
    with make_sandbox() as sandbox, _small_limits():
        for number in numbers:
            try:
                rng = Random(f"{seed}/{target}/{number}")
                outcome = TARGETS[target](sandbox, rng)
            except (Exception, Hang) as error:
                kind = _describe(error)
                if kind not in campaign.failures:
                    log(f"FAILURE in case {number}\n{traceback.format_exc()[-3000:]}")
                campaign.failures.setdefault(kind, []).append(number)
                outcome = {"failure": 1}
            sandbox.clear()
            campaign.outcomes.update({_remove_details(name) for name in outcome})
            if number % 1000 == 999:
                log(f"{target}: case {number:,}, {time.monotonic() - start_s:.0f} s")
    return campaign


def _describe(error: BaseException) -> str:
    """Returns the type of an error, and the last line of the project in its trace."""
    cause = "" if isinstance(error, Hang) else f": {str(error)[:24]!a}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "ccu_jax" in frame.filename or isinstance(error, Failure):
            cause = f" at {pathlib.Path(frame.filename).name}:{frame.lineno}{cause}"
            break
    return type(error).__name__ + cause


def _remove_details(outcome: str) -> str:
    """Removes names and numbers from an outcome, so that equal ones are counted."""
    if " (data.strict is on" in outcome:
        return "strict: " + outcome.partition(" (data.strict")[0].rpartition(": ")[2]
    if outcome.startswith("error: "):
        quoted = r"(?<=ROOT)\S*|(?<=WORK)\S*|'[^']*'|\"[^\"]*\"|\(.*\)"
        return re.sub("[0-9][0-9,]*", "N", re.sub(quoted, "", outcome))[:70]
    return outcome


@contextlib.contextmanager
def _small_limits() -> Iterator[None]:
    """Lowers the limits of archives and lines: the same code runs much faster."""
    before = archives.MIN_LIMIT_BYTES, untrusted_files.MAX_LINE_BYTES
    archives.MIN_LIMIT_BYTES, untrusted_files.MAX_LINE_BYTES = 1 << 20, 3000
    try:
        yield
    finally:
        archives.MIN_LIMIT_BYTES, untrusted_files.MAX_LINE_BYTES = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a case to repeat")
    args = parser.parse_args()
    numbers = range(args.cases)
    if args.only is not None:
        numbers = range(args.only, args.only + 1)
    num_failures = 0
    for target in args.targets:
        campaign = run_campaign(
            target, numbers, args.seed, lambda line: print(line, flush=True)
        )
        for name, count in campaign.outcomes.most_common():
            print(f"{count:9,}  {ascii(name)[1:-1]}")
        for kind, cases in campaign.failures.items():
            print(f"FAILURES {kind}: {len(cases):,} cases, such as {cases[:5]}")
        num_failures += len(campaign.failures)
    print(f"{num_failures} kinds of failures")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
