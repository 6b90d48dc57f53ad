"""A few faults of every kind; `python -m tests.faults` makes them by the hundred."""

import pytest

from tests.faults import __main__ as faults
from tests.faults import disks as faults_disks
from tests.faults import files as faults_files
from tests.faults.world import World

_DISKS = ("disk full", "read-only folder")
# Left to others: files below, and `test_hosts.py` tells two processes to leave.
_KINDS = [k for k in faults.KINDS if k not in ("damaged files", "preempted hosts")]
# One of each state that a run can be in; what only a pool of shadows has is left out.
_DAMAGED = (
    "outputs of the original",
    "original's parameters",
    "feature store",
    "receipts of requests",
    "prepared data",
)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"), quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_a_run_goes_on_from_a_fault_of_each_kind_to_the_undisturbed_end(world, kind):
    if kind in _DISKS and not faults_disks.possible():
        pytest.skip("this machine lets nobody mount a disk in a namespace")
    for number in range(8):
        told = faults.run_case(world, kind, number)
        assert told["failure"] is None, told["failure"]
        if told["faults"]:  # else the run had ended before
            return
    pytest.fail("every run had ended before the fault")


@pytest.mark.slow
@pytest.mark.parametrize("target", _DAMAGED)
def test_a_damaged_file_is_mended_or_named_with_the_remedy(world, target):
    number = list(faults_files.TARGETS).index(target)
    told = faults.run_case(world, "damaged files", number)
    assert told["failure"] is None, told["failure"]


def test_every_way_of_damage_comes_to_every_target():
    drawn = {faults_files.drawn(number) for number in range(64)}
    targets, ways = faults_files.TARGETS, faults_files.WAYS
    assert drawn == {(target, way) for target in targets for way in ways}
