"""Rows of results, and reporters that print into a buffer."""

import io

import pytest
from rich.console import Console

from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.runs.progress import Reporter


def _make_row(method, seed=0, *, fused=0.6, auc=0.52, unlearn_s=10.0, **changes):
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
def make_row():
    """Makes a complete row of results.json; keywords replace or add keys."""
    return _make_row


@pytest.fixture
def good_rows():
    """Two seeds in which ccu_plus meets every target."""
    return [
        _make_row(method, seed, fused=fused + slope * seed, auc=auc, unlearn_s=seconds)
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
def rows_with_requests(make_row):
    """Two seeds of ccu, with two unlearning requests and with one."""

    def request(seconds, auc):
        views = dict.fromkeys(("image", "text", "fused", "pair"), auc)
        return {
            "count": 40,
            "seconds": {"start": 1.0, "steps": seconds - 1, "unlearn": seconds},
            "attack_auc": {"all": views, "first": views, "this": views},
            "scores": {"test": {"fused": {"accuracy": 0.5}}},
        }

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
        buffer = io.StringIO()
        buffer.isatty = lambda: width is not None
        console = Console(
            file=buffer,
            force_terminal=width is not None,
            width=width,
            _environ={"TERM": "xterm"},
        )
        monkeypatch.setattr(reporter, "console", console)
        return reporter, buffer

    return make
