"""A few faults of every kind; `python -m tests.faults` makes them by the hundred."""

import pytest

from tests.faults import __main__ as faults
from tests.faults import disks, files
from tests.faults.world import World

# Tested with others: files below, and `test_hosts.py` preempts two processes.
_KINDS = [k for k in faults.KINDS if k not in ("damaged files", "preempted hosts")]
# One of each state that a run can be in, except those with shadow models.
_DAMAGED = ("outputs of the original", "original's parameters", "feature store")
_DAMAGED += ("receipts of requests", "prepared data")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"), is_quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_run_resumes_from_a_fault_of_each_kind_with_the_same_bits(world, kind):
    if kind in ("disk full", "read-only folder") and not disks.can_mount():
        pytest.skip("this machine lets no user mount a disk in a namespace")
    for number in range(8):
        record = faults.run_case(world, kind, number)
        assert record["failure"] is None, record["failure"]
        if record["faults"]:  # else the run had ended before
            return
    pytest.fail("every run had ended before the fault")


@pytest.mark.slow
@pytest.mark.parametrize("target", _DAMAGED)
def test_damaged_file_is_recreated_or_named_with_the_remedy(world, target):
    number = list(files.TARGETS).index(target)
    record = faults.run_case(world, "damaged files", number)
    assert record["failure"] is None, record["failure"]


def test_every_target_gets_every_damage():
    chosen = {files.choose_damage(number) for number in range(64)}
    assert chosen == {(t, damage) for t in files.TARGETS for damage in files.DAMAGES}
