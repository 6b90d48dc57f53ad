"""The files of the report: complete, escaped, and never half written."""

import json
import os
import re

import numpy as np
import pytest

from ccu_jax.reports import figure
from ccu_jax.reports.report import write_report
from ccu_jax.reports.summary import DASH
from tests.reports.conftest import make_row


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write_report_writes_every_file(tmp_path, good_rows, rows_with_requests):
    write_report(tmp_path, good_rows, {"seed": 3})
    names = {"results.json", "table.md", "figure.png", "report.html"}
    assert set(read_all(tmp_path)) == names
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>ccu_plus</td>") == 3  # the mean and the two seeds
    assert "&#34;seed&#34;: 3" in page and "Sequential" not in page
    write_report(tmp_path, rows_with_requests, {})
    assert "<h2>Sequential requests</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{"method": "ccu_plus"}, {"method": "retrain_visual", "seconds": None}],
        [make_row("ccu_plus", scores=None, seconds=3, unlearn_set="x")],
        [make_row("scrub", device=None, metric=None, text_unchanged=None)],
        [make_row("ccu_plus", seconds={"unlearn": 0.0}, attack_auc=[])],
        [make_row("a", fused=np.float32(0.5), auc=np.nan, seed=np.int64(3))],
    ],
)
def test_rows_without_some_keys_are_shown_with_dashes(rows, tmp_path):
    write_report(tmp_path, rows, {})
    assert not rows or DASH in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(rows)


def test_hostile_text_is_escaped_everywhere(good_rows, tmp_path):
    evil = "<script>alert(1)</script>|![x](http://evil.example)$\\frac{$\n\x1b[2J\ud800"
    verdict = {"word": evil, "sentence": evil}
    verdict["differences"] = dict.fromkeys(("image", "fused", "pair"))
    audit = {"method": evil, "edition": evil, "seeds": [], "verdict": verdict}
    rows = [*good_rows, make_row(evil, diverged=evil, commit=evil, config=evil)]
    config = {evil: [evil, {"x": "</pre><img src=x>"}]}
    write_report(tmp_path, rows, config, [audit])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") > 8 and "<h2>Audit</h2>" in page
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page)
    table = (tmp_path / "table.md").read_text()
    assert "<script" not in table.replace("\\<", "") and "![x]" not in table
    assert "\x1b" not in table and "\x1b" not in page
    cells = [re.sub(r"\\\|", "", t) for t in table.split("\n") if t.startswith("|")]
    assert len({line.count("|") for line in cells}) == 1


@pytest.mark.parametrize("failure", ["replace", "draw"])
def test_a_failed_write_keeps_the_old_files(tmp_path, monkeypatch, good_rows, failure):
    write_report(tmp_path, good_rows, {})
    before = read_all(tmp_path)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os if failure == "replace" else figure, failure, fail)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, good_rows[:1], {})
    assert read_all(tmp_path) == before
