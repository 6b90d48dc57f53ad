"""Fuzzes the data set readers: hostile files may cause only clear errors.

    python -m tests.fuzz --cases 100000 --seed 0 mmimdb csv images

Each case is written to a folder in memory, located, opened and read as for training. It
may yield rows, skipped rows, or a one-line error. Repeat a case by its number:
`--only 1234`.
"""

import argparse
import collections
import functools
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Iterable
from random import Random
from typing import NamedTuple
from unittest import mock

from ccu_jax.data.readers import archives, untrusted_files
from tests.fuzz.archives import draw_archive
from tests.fuzz.checks import decode_image, read_case, unpack_archive
from tests.fuzz.contents import draw_hostile_image
from tests.fuzz.data_sets import CASES
from tests.fuzz.sandbox import Failure, Hang, Sandbox, make_sandbox

STORED_FRACTION = 0.01  # of the cases that are also prepared for training
STRICT_FRACTION = 0.1  # of the cases in which an unusable row is an error

TARGETS = (*CASES, "archives", "images")


def run_case(target: str, sandbox: Sandbox, rng: Random) -> dict[str, int]:
    """Draws and runs a case; returns outcome counts, raises Failure or Hang."""
    if target == "archives":
        data = draw_archive(rng)
        return unpack_archive(sandbox, data, rng.random() < STRICT_FRACTION)
    if target == "images":
        size, crop_margins = rng.choice((4, 8, 48)), rng.random() < 0.3
        return decode_image(sandbox, draw_hostile_image(rng), size, crop_margins)
    strict, store = rng.random() < STRICT_FRACTION, rng.random() < STORED_FRACTION
    return read_case(sandbox, CASES[target](rng), strict=strict, store=store)


class Campaign(NamedTuple):
    """The outcome counts of a target, and the failed case numbers by kind of error."""

    outcomes: collections.Counter[str]
    failures: dict[str, list[int]]


def run_campaign(target: str, numbers: Iterable[int], seed: int, log=None) -> Campaign:
    """Runs the cases `numbers` of a target; `log` prints progress and failures."""
    campaign, start_s = Campaign(collections.Counter(), {}), time.monotonic()
    with (
        make_sandbox() as sandbox,
        # Low limits run the same code much faster.
        mock.patch.object(archives, "MIN_LIMIT_BYTES", 1 << 20),
        mock.patch.object(untrusted_files, "MAX_LINE_BYTES", 3000),
    ):
        for number in numbers:
            try:
                rng = Random(f"{seed}/{target}/{number}")
                outcome = run_case(target, sandbox, rng)
            except (Exception, Hang) as error:
                kind = _describe_error(error)
                if log and kind not in campaign.failures:
                    log(f"FAILURE in case {number}\n{traceback.format_exc()[-3000:]}")
                campaign.failures.setdefault(kind, []).append(number)
                outcome = {"failure": 1}
            sandbox.clear()
            campaign.outcomes.update({_remove_details(name) for name in outcome})
            if log and number % 1000 == 999:
                log(f"{target}: case {number:,}, {time.monotonic() - start_s:.0f} s")
    return campaign


def _describe_error(error: BaseException) -> str:
    """Returns an error's type, message, and last traceback line in this project."""
    cause = "" if isinstance(error, Hang) else f": {str(error)[:24]!a}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "ccu_jax" in frame.filename or isinstance(error, Failure):
            cause = f" at {pathlib.Path(frame.filename).name}:{frame.lineno}{cause}"
            break
    return type(error).__name__ + cause


def _remove_details(outcome: str) -> str:
    """Removes names and numbers from an outcome, so that similar ones are merged."""
    if " (data.strict is on" in outcome:
        return "strict: " + outcome.partition(" (data.strict")[0].rpartition(": ")[2]
    if outcome.startswith("error: "):
        quoted = r"(?<=ROOT)\S*|(?<=WORK)\S*|'[^']*'|\"[^\"]*\"|\(.*\)"
        return re.sub("[0-9][0-9,]*", "N", re.sub(quoted, "", outcome))[:70]
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a case to repeat")
    args = parser.parse_args()
    numbers = range(args.cases) if args.only is None else [args.only]
    log, num_failures = functools.partial(print, flush=True), 0
    for target in args.targets:
        campaign = run_campaign(target, numbers, args.seed, log)
        for name, count in campaign.outcomes.most_common():
            print(f"{count:9,}  {ascii(name)[1:-1]}")
        for kind, cases in campaign.failures.items():
            print(f"FAILURES {kind}: {len(cases):,} cases, such as {cases[:5]}")
        num_failures += len(campaign.failures)
    print(f"{num_failures} kinds of failures")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
