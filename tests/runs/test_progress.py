"""Progress of a run on a terminal, in a log file and in events.jsonl."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from ccu_jax.runs import progress


def make_reporter(tmp_path, **terminal):
    """Returns a reporter and the buffer it writes to, a terminal if it has settings."""
    reporter, buffer = progress.Reporter(tmp_path, is_active=True), io.StringIO()
    buffer.isatty = lambda: bool(terminal)
    environ = {"TERM": "xterm"} if terminal else {}
    reporter.console = Console(
        file=buffer, force_terminal=bool(terminal), _environ=environ, **terminal
    )
    return reporter, buffer


def events(tmp_path):
    """Returns the events; NaN and infinity, which are not JSON, fail the test."""
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_events_are_strict_json_after_a_crash(tmp_path):
    reporter, _ = make_reporter(tmp_path)
    reporter.event("loss", value=np.float32("nan"), many=np.array([1.0, np.inf]))
    reporter.event("odd", path=tmp_path, flag=np.bool_(True), nested={3: {np.int8(1)}})

    def crash():
        with reporter.stage("train", 10) as stage:
            stage.update(1, loss=np.float32(0.5))
            raise KeyError("lost")

    with pytest.raises(KeyError):
        crash()
    # The process dies without `close`, and cuts off its last line.
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "to')
    resumed, _ = make_reporter(tmp_path)
    resumed.event("resumed")
    for _ in range(2):
        resumed.close()
    resumed.event("late")  # a closed reporter writes nothing
    recorded = events(tmp_path)
    assert [e["kind"] for e in recorded[-3:]] == ["stage_start", "stage_end", "resumed"]
    assert recorded[0]["value"] is None and recorded[0]["many"] == [1.0, None]
    assert recorded[1]["nested"] == {"3": [1]} and recorded[1]["flag"] is True
    assert recorded[-2]["failure"] == "KeyError"
    assert recorded[-2]["metrics"] == {"loss": 0.5}
    assert all(e["time"].endswith("+00:00") for e in recorded)


def test_log_file_prints_start_and_end_with_the_position_in_the_plan(tmp_path):
    reporter, screen = make_reporter(tmp_path)
    reporter.plan(["prepare", "train", "ccu [bold]"])
    with reporter.stage("train", 100) as stage:  # "prepare" was finished before
        for step in range(1, 101):
            stage.update(step, loss=1 / step)
    with reporter.stage("ccu [bold]"):
        reporter.log("a [red]line[/red]\x1b[2J " + "x" * 200)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "[2/3] train ..."
    assert lines[1].startswith("[2/3] train: done, 100/100, loss 0.01,")
    assert re.search(r", \d+\.\d s$", lines[1])
    assert lines[2] == "[3/3] ccu [bold] ..."
    assert lines[3].startswith("a [red]line[/red]\ufffd[2J xxx") and len(lines) == 5


def test_log_file_prints_a_line_every_ten_seconds(tmp_path, monkeypatch):
    reporter, screen = make_reporter(tmp_path)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with reporter.stage("train", 100) as stage:
        for step in range(1, 51):
            clock[0] += 0.5
            stage.update(step, loss=2.0)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 4  # start, after 10 s, after 20 s, end
    assert lines[1] == "train: 20/100, 0:40 left, loss 2, 2/s"
    assert [e["kind"] for e in events(tmp_path)].count("progress") == 2


@pytest.mark.parametrize("width", [8, 30, 100])
@pytest.mark.parametrize("no_color", [True, False])
def test_live_display_fits_the_terminal(tmp_path, width, no_color):
    reporter, _ = make_reporter(tmp_path, width=width, no_color=no_color)
    title, display = "train [/bold] " + "long " * 20, io.StringIO()
    reporter.plan([title])
    with reporter.stage(title, 10) as stage:
        stage.update(3, loss=float("nan"), note="[/]")
        with reporter.stage("inner"):
            Console(file=display, width=width).print(reporter._render())
    lines = display.getvalue().splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= width
    reporter.close()


def test_inactive_reporter_is_silent(tmp_path, capsys):
    reporter = progress.Reporter(tmp_path / "none", is_active=False)
    reporter.plan(["a"])
    with reporter.stage("a", 3) as stage:
        stage.update(1, loss=object())
    reporter.log("x")
    reporter.warn("x")
    reporter.event("x")
    reporter.close()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "none").exists()
