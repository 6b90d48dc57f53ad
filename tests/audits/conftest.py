"""Contexts of runs on toy data."""

import pytest

from tests.toy import make_context


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes the context of a run and the list of its warnings."""

    def make(problem, data):
        warnings: list[str] = []
        ctx = make_context(problem, data, tmp_path)
        monkeypatch.setattr(ctx.reporter, "warn", warnings.append)
        return ctx, warnings

    return make
