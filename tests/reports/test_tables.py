"""The results tables, as Markdown and on a terminal."""

import re

import pytest

from ccu_jax.reports import report, tables
from ccu_jax.reports.summary import DASH
from ccu_jax.runs.progress import Reporter
from tests.reports.conftest import cells_of, make_row


def show_on_terminal(rows, make_reporter, width):
    """Returns the text of the report on a terminal of `width` characters."""
    reporter, screen = make_reporter(width)
    report.show(rows, reporter)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_methods_have_a_fixed_order_and_times(good_rows):
    rows = [*good_rows, make_row("zzz"), make_row("ccu")]
    cells = {row["method"]: row for row in cells_of(tables.make_method_table(rows))}
    order = "original retrain_visual finetune scrub ccu ccu_plus zzz"
    assert list(cells) == order.split()
    method = cells["ccu_plus"]
    assert method["time (% of retrain_visual)"] == "5.00 ± 0.00"
    assert method["time (% of scrub, best baseline)"] == "25.0 ± 0.0"
    # 65 and 67: standard deviation sqrt(2), t(0.975, 1) = 12.7062, over sqrt(2).
    assert method["test fused"] == "66.0 ± 12.7"
    original = cells["original"]
    assert original["time (s)"] == original["time (% of retrain_visual)"] == DASH


def test_markdown_emphasizes_warnings_and_missed_targets(good_rows):
    good_rows[1]["text_unchanged"] = False
    text = report.to_markdown(good_rows)
    assert text.count("**Clip art: 1,408") == 2  # at the top and among the findings
    assert "- **ccu\\_plus" not in text and "- **ccu_plus leaves the text" in text
    assert "- ccu_plus takes at most 10 %" in text


def test_requests_have_their_own_table(rows_with_requests, make_reporter):
    first, second = cells_of(tables.make_request_table(rows_with_requests))
    assert (first["method"], first["request"], first["rows"]) == ("ccu", "1", "40 ± 0")
    assert first["time (% of retrain_visual)"] == "4.00 ± 0.00"
    assert first["attack AUC image, all requests"] == "0.510 ± 0.127"
    assert second["attack AUC fused, first request"] == "0.600"
    assert second["time (s)"] == "6.00" and second["test fused"] == "50.0"
    assert "\n## Sequential requests\n" in report.to_markdown(rows_with_requests)
    text = show_on_terminal(rows_with_requests, make_reporter, width=70)
    requests = text.partition("Sequential requests")[2].partition("Clip art")[0]
    # Too wide for the terminal: several tables, each with method and request.
    assert len(re.findall(r"^ *ccu +1 ", requests, flags=re.M)) > 1


@pytest.mark.parametrize(
    "requests", [None, [], "x", {}, [None], [{}, 3, {"seconds": 3, "attack_auc": []}]]
)
def test_malformed_requests_are_shown_with_dashes(requests):
    table = tables.make_request_table([make_row("ccu", requests=requests)])
    assert bool(table.rows) == (isinstance(requests, list) and {} in requests)


@pytest.mark.parametrize("width", [8, 30, 100])
def test_tables_fit_the_terminal(good_rows, make_reporter, width):
    text = show_on_terminal(good_rows, make_reporter, width)
    assert max(len(line) for line in re.split(r"[\r\n]", text)) <= width
    assert "retrain_visual" in text or width == 8


def test_a_log_file_gets_markdown(good_rows, make_reporter, tmp_path, capsys):
    reporter, screen = make_reporter()
    report.show(good_rows, reporter)
    assert "| scrub | 20.0 ± 0.0 |" in screen.getvalue()
    report.show(good_rows, Reporter(tmp_path, is_active=False))
    assert capsys.readouterr() == ("", "")
