"""What processes agree on, and the errors of hosts that are missing or lost."""

from unittest import mock

import jax
import numpy as np
import pytest

from ccu_jax import launch
from ccu_jax.distributed import hosts, lost_hosts
from ccu_jax.errors import RetryableError, UserError

GLOO_ERROR = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")


def test_path_that_process_0_sees_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "file"
    is_ready = mock.Mock(side_effect=[False, False, False, True, True])
    assert not hosts.wait_until_visible(path)
    path.touch()
    assert hosts.wait_until_visible(path)
    assert not hosts.wait_until_visible(path, is_ready)
    monkeypatch.setattr(hosts, "broadcast_from_primary", np.ones_like)
    assert hosts.wait_until_visible(path, is_ready)
    monkeypatch.setattr(hosts, "_VISIBLE_TIMEOUT_S", 0.3)
    with pytest.raises(
        RetryableError, match="absent: visible to process 0, but not to"
    ):
        hosts.wait_until_visible(tmp_path / "absent")


@pytest.mark.parametrize(
    "addresses, error, timeout_s, error_type, message",
    [
        (
            {"num_processes": 3},
            RuntimeError("x"),
            9,
            RetryableError,
            "cannot join .* x",
        ),
        ({"num_processes": 3}, RuntimeError("x"), 0, RetryableError, "not all 3 proc"),
        ({}, ValueError("x"), 9, UserError, "pass --multihost ADDRESS:PORT"),
    ],
)
def test_failed_start_is_one_line(
    monkeypatch, addresses, error, timeout_s, error_type, message
):
    monkeypatch.setattr(jax.distributed, "initialize", mock.Mock(side_effect=error))
    monkeypatch.setattr(lost_hosts, "START_TIMEOUT_S", timeout_s)
    with pytest.raises(UserError, match=message) as caught:
        hosts.join_hosts(addresses)
    assert type(caught.value) is error_type


def test_collective_that_fails_is_one_line_and_exit_code_75(monkeypatch, capsys):
    fail = mock.Mock(side_effect=GLOO_ERROR)
    monkeypatch.setattr(launch, "_run_command", fail)
    with pytest.raises(ValueError, match="Gloo"):  # a single process has no peers
        launch.main([])
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    error = RuntimeError("a checkpoint failed")
    error.__cause__ = GLOO_ERROR
    for lost in (error, GLOO_ERROR):
        fail.side_effect = lost
        assert launch.main([]) == 75
        printed = capsys.readouterr().err
        assert printed.startswith("error: another process") and printed.count("\n") == 1
    fail.side_effect = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert launch.main([]) == 2 and "out of memory" in capsys.readouterr().err


@pytest.fixture
def two_processes(monkeypatch):
    """Sets the index of this process; `sent` lists what process 0 broadcasts."""
    sent = []

    def be_process(index, received=()):
        received = iter(received)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)

        def broadcast(array):
            sent.append(int(array))
            return array if index == 0 else np.array(next(received))

        monkeypatch.setattr(hosts, "broadcast_from_primary", broadcast)
        return sent

    return be_process


def test_primary_reports_that_it_works_and_that_it_is_done(two_processes, monkeypatch):
    sent, shown = two_processes(0), []
    monkeypatch.setattr(hosts, "_SYNC_EVERY_S", 0.0)

    def work(progress):
        progress("decoding", 1, 2)
        return "result"

    assert hosts.run_on_primary(work, lambda *args: shown.append(args)) == "result"
    assert sent == [hosts._WORKING, hosts._DONE] and shown == [("decoding", 1, 2)]
    two_processes(1, received=[hosts._WORKING, hosts._WORKING, hosts._DONE])
    assert hosts.run_on_primary(work, print) is None


@pytest.mark.parametrize(
    "error, code", [(UserError("no file"), 2), (RetryableError("no mount"), 75)]
)
def test_error_of_process_0_ends_the_others_with_its_exit_code(
    two_processes, error, code
):
    work, sent = mock.Mock(side_effect=error), two_processes(0)
    with pytest.raises(type(error)):
        hosts.run_on_primary(work, print)
    assert sent == [code]
    two_processes(1, received=[code])
    with pytest.raises(type(error), match="process 0 failed") as caught:
        hosts.run_on_primary(work, print)
    assert type(caught.value) is type(error)
