"""Rows of results, and reporters that print into a buffer."""

import io

import pytest
from rich.console import Console

from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.runs.progress import Reporter


def make_row(method, seed=0, *, fused=0.6, auc=0.52, unlearn_s=10.0, **changes):
    """Returns a complete row of results.json; keywords replace or add keys."""
    views = {view: {"accuracy": fused} for view in ("image", "text", "fused")}
    return {
        "config": "clipart",
        "edition": "clipart",
        "method": method,
        "seed": seed,
        "metric": "accuracy",
        "unlearn_set": {"rule": "random:0.1", "modality": "image", "count": 120},
        "seconds": {"start": 1.0, "steps": unlearn_s - 1.0, "unlearn": unlearn_s},
        "scores": dict.fromkeys(SPLITS, views),
        "attack_auc": dict.fromkeys(("image", "text", "fused", "pair"), auc),
        "text_unchanged": method.startswith("ccu"),
        "diverged": None,
        "device": {"kind": "cpu", "count": 1, "processes": 1},
        "versions": {"jax": "0.9.0"},
        "commit": "abc1234",
    } | changes


@pytest.fixture
def good_rows():
    """Two seeds in which ccu_plus meets every target."""
    return [
        make_row(method, seed, fused=fused + slope * seed, auc=auc, unlearn_s=seconds)
        for seed in (0, 1)
        for method, fused, slope, auc, seconds in (
            ("scrub", 0.61, 0.01, 0.56, 20.0),
            ("ccu_plus", 0.65, 0.02, 0.53, 5.0),
            ("original", 0.7, 0.0, 0.9, 77.0),
            ("retrain_visual", 0.6, 0.0, 0.52, 100.0),
            ("finetune", 0.6, 0.0, 0.7, 15.0),
        )
    ]


@pytest.fixture
def rows_with_requests():
    """Two seeds of ccu, with two unlearning requests and with one."""

    def request(seconds, auc):
        views = dict.fromkeys(("image", "text", "fused", "pair"), auc)
        aucs = dict.fromkeys(("all", "first", "this"), views)
        return make_row("ccu", fused=0.5, unlearn_s=seconds, attack_auc=aucs, count=40)

    requests = [[request(4.0, 0.5), request(6.0, 0.6)], [request(4.0, 0.52)]]
    return [
        *(make_row("retrain_visual", seed, unlearn_s=100.0) for seed in (0, 1)),
        *(make_row("ccu", seed, requests=requests[seed]) for seed in (0, 1)),
    ]


@pytest.fixture
def make_reporter(tmp_path, monkeypatch):
    """Makes a reporter and its output, a terminal if it has a width, else a log."""

    def make(width=None):
        reporter = Reporter(tmp_path, is_active=True)
        buffer, has_width = io.StringIO(), width is not None
        buffer.isatty = lambda: has_width
        options = {"force_terminal": has_width, "_environ": {"TERM": "xterm"}}
        console = Console(file=buffer, width=width, **options)
        monkeypatch.setattr(reporter, "console", console)
        return reporter, buffer

    return make


def cells_of(table):
    """Returns the cells of each row by column title."""
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]
