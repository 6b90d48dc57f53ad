"""Faults of every kind, made on purpose: what a run is left with, and how it goes on.

    python -m tests.faults --folder FOLDER [--only KIND ...] [--counts KIND=N ...]

Each case disturbs a run of a tiny configuration, starts the same command again and
compares the results with those of an undisturbed run, to the bit. The log of cases in
the folder lets a command that was stopped go on. Ends with a table of counts, and with
exit code 1 where a case has failed; the folder of such a case stays.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from tests import conftest  # noqa: F401  sets what JAX reads when it starts
from tests.faults import devices as faults_devices
from tests.faults import disks as faults_disks
from tests.faults import files as faults_files
from tests.faults import hosts as faults_hosts
from tests.faults import kills as faults_kills
from tests.faults.world import Case, World

_MOST_FAILURES = 8  # of a kind, in one command


class Kind(NamedTuple):
    """A kind of fault: what makes a case of it, and how many faults are wanted."""

    make: Callable[[Case], None]
    wanted: int


KINDS = {
    "kills": Kind(faults_kills.killed, 200),
    "damaged files": Kind(faults_files.damaged, 64),
    "disk full": Kind(faults_disks.full, 12),
    "read-only folder": Kind(faults_disks.read_only, 9),
    "vanished folder": Kind(faults_disks.vanished, 5),
    "preemptions": Kind(faults_kills.preempted, 14),
    "preempted hosts": Kind(faults_hosts.preempted, 24),
    "lost peers": Kind(faults_hosts.lost, 12),
    "killed hosts": Kind(faults_hosts.killed, 40),
    "other devices": Kind(faults_devices.moved, 9),
}


def run_case(world: World, kind: str, number: int) -> dict[str, Any]:
    """Makes one case; gives what is to be noted of it."""
    case = Case(world, kind.replace(" ", "-"), number)
    began, failure = time.monotonic(), None
    try:
        KINDS[kind].make(case)
    except Exception as error:  # noqa: BLE001  a case that fails must not end the rest
        failure = str(error) if isinstance(error, AssertionError) else _traced()
    if failure is None:
        shutil.rmtree(case.folder)
    return {
        "kind": kind,
        "number": number,
        "faults": case.faults,
        "starts": case.starts,
        "seconds": round(time.monotonic() - began, 1),
        "failure": failure,
    }


def _traced():
    return traceback.format_exc(limit=-4)


def main(argv=None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--counts", nargs="+", default=[], metavar="KIND=N")
    given = parser.parse_args(argv)
    wanted = {name: KINDS[name].wanted for name in given.only}
    for count in given.counts:
        name, _, number = count.partition("=")
        if name not in wanted:
            parser.error(f"there is no kind {name!r}; there are: {', '.join(KINDS)}")
        wanted[name] = int(number)
    world = World(given.folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(world.folder / "jax"))
    log = world.folder / "cases.jsonl"
    for kind, count in wanted.items():
        _run_kind(world, kind, count, log)
    noted = _noted(log)
    _show(noted, wanted)
    failed = [one for one in noted if one["kind"] in wanted and one["failure"]]
    return 1 if failed else 0


def _run_kind(world, kind, count, log):
    noted = [one for one in _noted(log) if one["kind"] == kind]
    done, number = sum(len(one["faults"]) for one in noted), len(noted)
    began, first, failures = time.monotonic(), done, 0
    while done < count and failures < _MOST_FAILURES:
        told = run_case(world, kind, number)
        number += 1
        with log.open("a") as file:
            file.write(json.dumps(told) + "\n")
        done += len(told["faults"])
        left = (time.monotonic() - began) / max(done - first, 1) * (count - done)
        print(
            f"{kind}: {done}/{count}, case {number - 1} {told['seconds']} s, about "
            f"{max(left, 0) / 60:.0f} min left",
            flush=True,
        )
        if told["failure"]:
            failures += 1
            print(f"  FAILED: {told['failure'][-600:]}", flush=True)


def _noted(log) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines()]


def _show(noted, wanted):
    """The table of counts, and what was hit how often."""
    print(
        f"\n{'kind':24}{'faults':>8}{'wanted':>8}{'cases':>8}{'starts':>8}{'failed':>8}"
    )
    for kind, count in wanted.items():
        mine = [one for one in noted if one["kind"] == kind]
        faults = [fault for one in mine for fault in one["faults"]]
        starts = sum(one["starts"] for one in mine)
        failed = sum(one["failure"] is not None for one in mine)
        print(f"{kind:24}{len(faults):8}{count:8}{len(mine):8}{starts:8}{failed:8}")
        for what, number in collections.Counter(faults).most_common():
            print(f"    {what:44}{number:6}")


if __name__ == "__main__":
    sys.exit(main())
