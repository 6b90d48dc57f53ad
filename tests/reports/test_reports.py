"""The report says what the rows say, and nothing that was not measured."""

import io
import json
import math
import os
import re

import numpy as np
import pytest
from rich.console import Console

from ccu_jax.evaluate import predictions
from ccu_jax.reports import findings as notes
from ccu_jax.reports import html as report
from ccu_jax.reports import summary
from ccu_jax.reports.summary import estimate
from ccu_jax.runs import progress


def row(method, seed=0, *, fused=0.6, auc=0.52, unlearn_s=10.0, **more):
    """Returns a complete row; `more` replaces or adds keys."""
    views = {view: {"accuracy": fused} for view in ("image", "text", "fused")}
    return {
        "config": "clipart",
        "edition": "clipart",
        "method": method,
        "seed": seed,
        "metric": "accuracy",
        "unlearn_set": {"rule": "random:0.1", "modality": "image", "count": 120},
        "seconds": {"start": 1.0, "steps": unlearn_s - 1.0, "unlearn": unlearn_s},
        "scores": dict.fromkeys(predictions.SPLITS, views),
        "attack_auc": dict.fromkeys(("image", "text", "fused", "pair"), auc),
        "text_unchanged": method.startswith("ccu"),
        "diverged": None,
        "device": {"kind": "cpu", "count": 1, "processes": 1},
        "versions": {"jax": "0.9.0"},
        "commit": "abc1234",
    } | more


def good_rows():
    """Two seeds in which ccu_plus meets every target."""
    rows = []
    for seed in (0, 1):
        rows += [
            row("scrub", seed, fused=0.61 + seed / 100, auc=0.56, unlearn_s=20.0),
            row("ccu_plus", seed, fused=0.65 + seed / 50, auc=0.53, unlearn_s=5.0),
            row("original", seed, fused=0.7, auc=0.9, unlearn_s=77.0),
            row("retrain_visual", seed, fused=0.6, auc=0.52, unlearn_s=100.0),
            row("finetune", seed, fused=0.6, auc=0.7, unlearn_s=15.0),
        ]
    return rows


def texts(rows, kind=None):
    """Returns the sentences, of one kind or all."""
    return [note.text for note in notes.notes(rows) if kind in (None, note.kind)]


def line_of(rows, method):
    """Returns a method's cells in the Markdown table."""
    lines = [text for text in report.markdown(rows).split("\n") if text[:1] == "|"]
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in lines]
    return dict(zip(cells[0], next(c for c in cells if c[0] == method), strict=True))


def plain_reporter(tmp_path, **terminal):
    """Returns a reporter that writes to a buffer, a terminal's if asked for."""
    reporter = progress.Reporter(tmp_path, active=True)
    buffer = io.StringIO()
    if terminal:
        buffer.isatty = lambda: True
    environ = {"TERM": "xterm"} if terminal else {}
    reporter.console = Console(
        file=buffer, force_terminal=bool(terminal), _environ=environ, **terminal
    )
    return reporter, buffer


def events(tmp_path):
    """Returns the events, each line parsed as strict JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_the_interval_is_the_t_interval():
    # 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.302653, over sqrt(3).
    value = estimate([1.0, 2.0, 3.0])
    assert value.mean == 2.0 and value.count == 3
    assert value.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(estimate([5.0]).half)
    assert estimate([5.0, math.nan, math.inf])[::2] == (5.0, 1)
    assert estimate([]).count == 0


def test_the_table_has_a_fixed_order_and_the_times():
    rows = [*good_rows(), row("zzz"), row("ccu")]
    order = re.findall(r"^\| (\w+) \|", report.markdown(rows), flags=re.M)
    assert order == ["method", "original", "retrain_visual", "finetune", "scrub"] + [
        "ccu",
        "ccu_plus",
        "zzz",
    ]
    assert line_of(rows, "ccu_plus")["time % of retrain_visual"] == "5.00 ± 0.00"
    assert line_of(rows, "ccu_plus")["time % of scrub (best baseline)"] == "25.0 ± 0.0"
    # 65 and 67: standard deviation sqrt(2), t(0.975, 1) = 12.7062, over sqrt(2).
    assert line_of(rows, "ccu_plus")["test fused"] == "66.0 ± 12.7"
    original = line_of(rows, "original")
    assert original["time s"] == original["time % of retrain_visual"] == "–"
    assert any("original was trained in 77.0" in text for text in texts(rows))


def test_time_is_paired_by_seed_and_else_by_the_mean():
    group = {"0": row("ccu", unlearn_s=5.0), "9": row("ccu", 9, unlearn_s=6.0)}
    reference = {"0": row("r", unlearn_s=50.0), "1": row("r", 1, unlearn_s=100.0)}
    percent = summary.time_percent(group, reference)
    assert percent.mean == pytest.approx((10.0 + 8.0) / 2)  # 5/50 and 6/75


def test_comparison_names_the_best_baseline_with_margin_and_time():
    found = [t for t in texts(good_rows()) if t.startswith("Baseline with the best")]
    assert len(found) == 1 and "scrub (61.5 ± 6.4 %)" in found[0]
    # Margins 4 and 5 points: half-width 12.7062 * sqrt(0.5) / sqrt(2) = 6.35.
    assert "margin +4.5 points (95 % interval -1.9 to +10.9 over 2" in found[0]
    assert "time ratio 25.0 ± 0.0 %" in found[0]
    against = [t for t in texts(good_rows()) if t.startswith("Against retrain_visual")]
    assert "ccu_plus" in against[0] and "time ratio 5.00" in against[0]


def test_the_best_of_the_baselines_that_forget_is_named_too():
    rows = good_rows()
    for seed in (0, 1):
        rows.append(row("salun", seed, fused=0.5, auc=0.51, unlearn_s=4.0))
    groups = summary.by_method(rows)
    assert summary.best_baseline(groups) == "scrub"  # whose attack AUC is .04 off
    assert summary.best_baseline(groups, forgets=True) == "salun"
    assert any(
        "among those whose attack AUCs" in text and "salun" in text
        for text in texts(rows)
    )
    # The attack on one view alone does not tell.
    for each in rows:
        if each["method"] == "salun":
            each["attack_auc"] = {**each["attack_auc"], "fused": 0.4}
    assert summary.best_baseline(summary.by_method(rows), forgets=True) is None
    # A form of CCU is no baseline, one whose name only begins like it is.
    more = [*rows, row("coun", 0, fused=0.9), row("ccu_gated", 0, fused=0.95)]
    assert summary.best_baseline(summary.by_method(more)) == "coun"


def test_a_diverged_method_is_named_and_is_no_best_baseline():
    bad = row("scrub", 1, fused=0.99, diverged="step 40: loss is NaN")
    rows = [r for r in good_rows() if (r["method"], r["seed"]) != ("scrub", 1)]
    found = texts([*rows, bad])
    assert any("scrub diverged (seed 1): step 40: loss is NaN" in t for t in found)
    assert any("best test fused score: finetune" in t for t in found)
    assert "scrub (diverged)" in report.markdown([*rows, bad])


def test_targets_that_are_met_say_yes():
    assert len(texts(good_rows(), "yes")) == 8 and not texts(good_rows(), "no")


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"auc": 0.60}, "image attack AUC"),
        ({"auc": 0.40}, "fused attack AUC"),  # lower than the reference is no better
        ({"text_unchanged": False}, "unchanged to the bit: no (in 0 of 2 seeds)"),
        ({"fused": 0.5}, "test fused score is at least retrain_visual's: no"),
        ({"attack_auc": {}}, "(not measured)"),
        ({"attack_auc": {"image": math.nan, "fused": None}}, "(not measured)"),
        ({"scores": {}}, "(not measured)"),
        ({"unlearn_s": 10.5}, "at most 10 % of retrain_visual's time: no (10.5 %)"),
    ],
)
def test_a_missed_target_says_no(change, claim):
    rows = [row("ccu_plus", seed, **change) for seed in (0, 1)]
    rows += [r for r in good_rows() if r["method"] != "ccu_plus"]
    missed = texts(rows, "no")
    assert any(claim in text for text in missed), missed
    assert all(text in report.markdown(rows) for text in missed)


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"auc": 0.64}, "original remembers the pictures"),
        ({"fused": math.nan}, "original's test fused score is not below"),
    ],
)
def test_an_original_with_nothing_to_forget_is_named(change, claim):
    rows = [r for r in good_rows() if r["method"] != "original"]
    rows.append(row("original", **change))
    assert any(text.startswith(claim) for text in texts(rows, "no"))


def test_an_original_whose_fusion_helps_nothing_is_named():
    rows = good_rows()
    for each in rows:
        if each["method"] == "original":
            views = {"image": 0.3, "text": 0.71, "fused": 0.7}
            test = {view: {"accuracy": x} for view, x in views.items()}
            each["scores"] = {**each["scores"], "test": test}
    (claim,) = texts(rows, "no")
    assert "not below that of picture or text alone: no (70.0 % and 30.0 %" in claim


@pytest.mark.parametrize(("count", "verdict"), [(120, "no"), (75, "yes")])
def test_a_small_unlearn_set_has_a_wider_tolerance(count, verdict):
    rows = good_rows()
    for each in rows:
        each["unlearn_set"] = {**each["unlearn_set"], "count": count}
        if each["method"] == "ccu_plus":
            each["attack_auc"] = dict.fromkeys(each["attack_auc"], 0.56)
    (claim,) = (text for text in texts(rows) if "image attack AUC is within" in text)
    assert f": {verdict} (0.560 and 0.520" in claim


@pytest.mark.parametrize("count, kind", [(150, "note"), (12, "loud")])
def test_the_attack_of_few_rows_is_called_rough(count, kind):
    rows = [
        row(
            name,
            unlearn_set={"rule": "random:0.1", "count": count, "pictures": count},
            counts={"unseen": 300},
        )
        for name in ("original", "retrain_visual")
    ]
    (text,) = (text for text in texts(rows, kind) if "standard error" in text)
    error = math.sqrt((count + 301) / (12 * count * 300))
    assert f"about {error:.3f}" in text and ("Too few" in text) == (kind == "loud")


def test_without_the_reference_only_what_needs_none_is_checked():
    rows = [
        row(name, unlearn_set={"rule": "random:0.1", "count": 75})
        for name in ("original", "ccu_plus")
    ]
    told = texts(rows, "no")
    assert any("is not in this run" in text for text in told)
    assert not any("ccu_plus's" in text or "not measured" in text for text in told)
    assert any("unchanged to the bit: yes" in text for text in texts(rows, "yes"))
    (looked,) = (text for text in texts(rows) if "Validation rows" in text)
    assert "by ccu_plus: " in looked


def test_without_ccu_plus_nothing_is_said_of_its_targets():
    rows = [r for r in good_rows() if r["method"] != "ccu_plus"]
    assert not any(
        text.startswith(("ccu_plus's", "ccu_plus takes")) for text in texts(rows)
    )
    assert not texts(rows, "no")
    assert all("original" in text for text in texts(rows, "yes"))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{"method": "ccu_plus"}, {"method": "retrain_visual", "seconds": None}],
        [row("ccu_plus", scores=None, seconds=3, attack_auc=[], unlearn_set="x")],
        [row("scrub", device=None, metric=None, edition=None, text_unchanged=None)],
        [row("ccu_plus", seconds={"unlearn": 0.0})],
        [row("a", fused=np.float32(0.5), auc=np.float64("nan"), seed=np.int64(3))],
    ],
)
def test_rows_that_lack_keys_are_reported_with_dashes(rows, tmp_path):
    report.write(tmp_path, rows, {})
    if rows:
        assert "–" in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows)


def test_the_edition_is_loud():
    sample = report.markdown([row("ccu", edition="sample")])
    assert "**Sample edition: pictures and texts generated by this program in" in sample
    assert "1,408 public-domain drawings" in report.markdown([row("ccu")])
    official = report.markdown([row("ccu", edition="official")])
    assert "Edition: official." in official and "clip art" not in official


def test_hostile_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>|![x](http://evil.example)$\\frac{$\n\x1b[2J\ud800"
    rows = [*good_rows(), row(evil, diverged=evil, commit=evil, config=evil)]
    report.write(tmp_path, rows, {evil: [evil, {"x": "</pre><img src=x>"}]})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page)
    table = (tmp_path / "table.md").read_text()
    assert "<script" not in table.replace("\\<", "") and "![x]" not in table
    assert "\x1b" not in table and "\x1b" not in page
    cells = [re.sub(r"\\\|", "", t) for t in table.split("\n") if t.startswith("|")]
    assert len({line.count("|") for line in cells}) == 1


def test_write_leaves_every_file_whole(tmp_path):
    report.write(tmp_path, good_rows(), {"seed": 3})
    names = {"results.json", "table.md", "figure.png", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>ccu_plus</td>") == 3  # the mean and the two seeds
    assert "&quot;seed&quot;: 3" in page


@pytest.mark.parametrize("broken", ["os.replace", "figure.draw"])
def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch, broken):
    report.write(tmp_path, good_rows(), {})
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError("no space left")

    owner = os if broken == "os.replace" else report.figure
    monkeypatch.setattr(owner, broken.split(".")[1], fail)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path, [row("ccu")], {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_events_are_strict_json_after_a_crash(tmp_path):
    reporter, _ = plain_reporter(tmp_path)
    reporter.event("loss", value=np.float32("nan"), many=np.array([1.0, np.inf]))
    reporter.event("odd", path=tmp_path, flag=np.bool_(True), nested={3: {np.int8(1)}})
    with pytest.raises(KeyError), reporter.stage("train", 10) as stage:
        stage.update(1, loss=np.float32(0.5))
        raise KeyError("lost")
    # No close: the process died. It also tore its last line.
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "to')
    again, _ = plain_reporter(tmp_path)
    again.event("resumed")
    again.close()
    found = events(tmp_path)
    assert [e["kind"] for e in found[-3:]] == ["stage_start", "stage_end", "resumed"]
    assert found[0]["value"] is None and found[0]["many"] == [1.0, None]
    assert found[1]["nested"] == {"3": [1]} and found[1]["flag"] is True
    assert found[-2]["failure"] == "KeyError" and found[-2]["metrics"] == {"loss": 0.5}
    assert all(e["time"].endswith("+00:00") for e in found)


def test_plain_progress_prints_start_and_end_with_the_place_in_the_plan(tmp_path):
    reporter, screen = plain_reporter(tmp_path)
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


def test_plain_progress_shows_a_sign_of_life(tmp_path, monkeypatch):
    reporter, screen = plain_reporter(tmp_path)
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
def test_the_live_display_fits_the_terminal(tmp_path, width, no_color):
    reporter, screen = plain_reporter(tmp_path, width=width, no_color=no_color)
    reporter.plan(["train [/bold] " + "long " * 20])
    with reporter.stage("train [/bold] " + "long " * 20, 10) as stage:
        stage.update(3, loss=float("nan"), note="[/]")
        with reporter.stage("inner"):
            reporter.console.print(reporter._live.get_renderable())
    report.show(good_rows(), reporter)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert max(len(line) for line in re.split(r"[\r\n]", text)) <= width
    assert "retrain_visual" in text or width == 8
    reporter.close()


def test_the_table_goes_to_a_log_as_markdown(tmp_path):
    reporter, screen = plain_reporter(tmp_path)
    report.show(good_rows(), reporter)
    assert "| scrub | 20.0 ± 0.0 |" in screen.getvalue()


def test_an_inactive_reporter_is_silent(tmp_path, capsys):
    reporter = report.Reporter(tmp_path / "none", active=False)
    reporter.plan(["a"])
    with reporter.stage("a", 3) as stage:
        stage.update(1, loss=object())
    reporter.log("x")
    reporter.warn("x")
    reporter.event("x")
    report.show(good_rows(), reporter)
    reporter.close()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "none").exists()


def test_a_closed_reporter_can_be_closed_again(tmp_path):
    reporter, _ = plain_reporter(tmp_path)
    reporter.close()
    reporter.close()
    reporter.event("late")
    assert not events(tmp_path)


# --- requests one after another -------------------------------------------------------


def request(seconds, auc):
    views = dict.fromkeys(("image", "text", "fused", "pair"), auc)
    return {
        "count": 40,
        "seconds": {"start": 1.0, "steps": seconds - 1, "unlearn": seconds},
        "attack_auc": {"all": views, "first": views, "this": views},
        "scores": {"test": {"fused": {"accuracy": 0.5}}},
    }


def streamed():
    rows = [row("retrain_visual", seed, unlearn_s=100.0) for seed in (0, 1)]
    told = [[request(4.0, 0.5), request(6.0, 0.6)], [request(4.0, 0.52)]]
    return rows + [row("ccu", seed, requests=told[seed]) for seed in (0, 1)]


def test_requests_have_a_table_of_their_own(tmp_path):
    reporter, screen = plain_reporter(tmp_path, width=70)
    report.show(streamed(), reporter)
    report.write(tmp_path, streamed(), {})
    table = (tmp_path / "table.md").read_text()
    lines = table.partition("## Streaming")[2].splitlines()
    cells = [[c.strip() for c in x.strip("|").split("|")] for x in lines if "|" in x]
    first, second = (dict(zip(cells[0], x, strict=True)) for x in cells[2:])
    assert (first["method"], first["request"], first["rows"]) == ("ccu", "1", "40 ± 0")
    assert first["time % of retrain_visual"] == "4.00 ± 0.00"
    assert first["attack AUC image, all so far"] == "0.510 ± 0.127"
    assert second["attack AUC fused, the first's"] == "0.600"
    assert second["time s"] == "6.00" and second["test fused"] == "50.0"
    assert "Streaming" in (tmp_path / "report.html").read_text()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    # In parts, each with method and number of the request.
    part = shown.partition("Streaming")[2].partition("Clip art")[0]
    assert len(re.findall(r"^ *ccu +1 ", part, flags=re.M)) > 1
    assert any("one after another" in text for text in texts(streamed()))


@pytest.mark.parametrize(
    "told", [None, [], "x", {}, [None], [{}, 3, {"seconds": 3, "attack_auc": []}]]
)
def test_requests_that_lack_keys_are_shown_with_dashes(told):
    table = report.markdown([row("ccu", requests=told)])
    assert ("Streaming" in table) == (isinstance(told, list) and {} in told)


def test_without_requests_there_is_no_table_of_them(tmp_path):
    report.write(tmp_path, good_rows(), {})
    assert "treaming" not in (tmp_path / "table.md").read_text()
    assert "treaming" not in (tmp_path / "report.html").read_text()
    assert not any("one after another" in text for text in texts(good_rows()))


def test_rules_whose_control_is_not_alike_are_told():
    for rule, words in (
        ("memorised:0.1", "chosen by what the original says of them"),
        ("group:Ann", "was drawn at random"),
        ("ids:list.txt", "was drawn at random"),
    ):
        rows = [row("ccu", unlearn_set={"rule": rule, "count": 9})]
        assert any(words in text for text in texts(rows))
