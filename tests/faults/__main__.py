"""Injects faults into runs and checks that they resume.

    python -m tests.faults --folder FOLDER [--only KIND ...] [--counts KIND=N ...]

Each case disturbs a run of a tiny configuration, reruns the same command and compares
all results bitwise with those of an undisturbed run. A log in the folder allows an
interrupted command to continue. Prints a table of counts; the exit code is 1 if a case
failed. Folders of failed cases are kept.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from tests import conftest  # noqa: F401  sets what JAX reads when it starts
from tests.faults import disks, files, signals
from tests.faults.world import Case, World

_MAX_FAILURES = 8  # of a kind, per command


# By kind of fault: the function that runs a case, and the number of faults to inject.
KINDS: dict[str, tuple[Callable[[Case], None], int]] = {
    "kills": (signals.kill_run, 200),
    "damaged files": (files.damage_file, 64),
    "disk full": (disks.fill_disk, 12),
    "read-only folder": (disks.make_read_only, 9),
    "removed folder": (disks.remove_folder, 5),
    "preemptions": (signals.preempt_run, 14),
    "preempted hosts": (signals.preempt_hosts, 24),
    "lost peers": (signals.lose_peer, 12),
    "killed hosts": (signals.kill_hosts, 40),
    "other devices": (signals.change_devices, 9),
}


def run_case(world: World, kind: str, number: int) -> dict[str, Any]:
    """Runs one case and returns its record for `cases.jsonl`."""
    case = Case(world, kind.replace(" ", "-"), number)
    start_s, failure, make_case = time.monotonic(), None, KINDS[kind][0]
    try:
        make_case(case)
    except AssertionError as error:
        failure = str(error)
    except Exception:  # a failing case must not end the others
        failure = traceback.format_exc(limit=-4)
    if failure is None:
        shutil.rmtree(case.folder)
    return {
        "kind": kind,
        "number": number,
        "faults": case.faults,
        "starts": case.num_starts,
        "seconds": round(time.monotonic() - start_s, 1),
        "failure": failure,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--counts", nargs="+", default=[], metavar="KIND=N")
    args = parser.parse_args(argv)
    counts = {name: KINDS[name][1] for name in args.only}
    for text in args.counts:
        name, _, number = text.partition("=")
        if name not in counts:
            parser.error(f"unknown kind {name!r}; choose from {', '.join(KINDS)}")
        counts[name] = int(number)
    world = World(args.folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(world.folder / "jax"))
    for kind, count in counts.items():
        _run_kind(world, kind, count)
    return _print_table(_read_log(world), counts)


def _run_kind(world: World, kind: str, count: int) -> None:
    """Runs and logs cases of a kind until `count` faults were injected."""
    records = [record for record in _read_log(world) if record["kind"] == kind]
    num_faults, num_failures = sum(len(record["faults"]) for record in records), 0
    for number in itertools.count(len(records)):
        if num_faults >= count or num_failures >= _MAX_FAILURES:
            return
        record = run_case(world, kind, number)
        with (world.folder / "cases.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        num_faults += len(record["faults"])
        num_failures += record["failure"] is not None
        print(f"{kind}: {num_faults}/{count}, {record['seconds']} s", flush=True)
        if record["failure"]:
            print(f"  FAILED: {record['failure'][-600:]}", flush=True)


def _read_log(world: World) -> list[dict[str, Any]]:
    path = world.folder / "cases.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _print_table(records: list[dict[str, Any]], kinds: Iterable[str]) -> int:
    """Prints the number of faults by kind and stage; returns the exit code."""
    num_failed = 0
    print(f"\n{'kind':24}{'faults':>8}{'cases':>8}{'starts':>8}{'failed':>8}")
    for kind in kinds:
        cases = [record for record in records if record["kind"] == kind]
        faults = [fault for record in cases for fault in record["faults"]]
        starts = sum(record["starts"] for record in cases)
        failed = sum(record["failure"] is not None for record in cases)
        print(f"{kind:24}{len(faults):8}{len(cases):8}{starts:8}{failed:8}")
        for fault, number in collections.Counter(faults).most_common():
            print(f"    {fault:44}{number:6}")
        num_failed += failed
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
